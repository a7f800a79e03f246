"""Which dialect a model speaks: named by the operator, or told from its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jinja2

from server.api.dialects.calls import PARSERS, ToolParser
from server.api.dialects.thinking import THOUGHTS, ThoughtTags
from server.errors import ConfigError
from server.registry import resolve
from server.text import Tokenizer

AUTO, NONE = "auto", "none"
_CALL_SIGNS: tuple[tuple[str, str], ...] = (
    ("<function=", NONE),  # Qwen3-Coder's calls stand between the tags of hermes and are no JSON
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3"),
    ('{"name": function name, "parameters": dictionary', "llama3"),
)
"""What a chat template with tools says, and whose it is then; the first that fits."""


@dataclass(frozen=True)
class Dialect:
    """What one served model's answers are made of. `special`: markers that its vocabulary has control tokens for."""

    tools: type[ToolParser] | None = None
    thoughts: ThoughtTags | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    template_names: frozenset[str] = frozenset()
    """Variables, attributes and strings in the code of the chat template: what is not among them, it does not know."""
    summary: str = "tool calls: none; reasoning: none"


NO_DIALECT = Dialect()


def dialect_of(tokenizer: Tokenizer, tools: str = AUTO, thoughts: str = AUTO) -> Dialect:
    """The dialect by names of parsers, each perhaps `auto` or `none`. Raises ConfigError for a name there is not."""
    template = tokenizer.chat_template
    names = _names_in(template)
    calls_name = _calls_of(template, names) if tools == AUTO else tools
    thoughts_name = _thoughts_of(template) if thoughts == AUTO else thoughts
    parser: type[ToolParser] | None = None
    if calls_name != NONE:
        parser = resolve("tool_call_parser", PARSERS, calls_name)
    if thoughts_name not in (NONE, *THOUGHTS):
        known = ", ".join(sorted(THOUGHTS))
        raise ConfigError(f"unknown reasoning_parser {thoughts_name!r} (there are: {known})", param="reasoning_parser")
    tags = THOUGHTS.get(thoughts_name)
    markers = (*(parser.markers if parser else ()), *((tags.open, tags.close) if tags else ()))
    control = tokenizer.special_tokens
    origin = {AUTO: ", by the chat template"}
    return Dialect(
        parser,
        tags,
        {marker: control[marker] for marker in markers if marker in control},
        names,
        f"tool calls: {calls_name}{origin.get(tools, '')}; reasoning: {thoughts_name}{origin.get(thoughts, '')}",
    )


def _names_in(template: str) -> frozenset[str]:
    try:
        lexed = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:
        return frozenset()  # it will not render either, and says so then
    return frozenset(value.strip("'\"") for _, kind, value in lexed if kind in ("name", "string"))


def _calls_of(template: str, names: frozenset[str]) -> str:
    if "tools" not in names:
        return NONE
    return next((name for sign, name in _CALL_SIGNS if sign in template), NONE)


def _thoughts_of(template: str) -> str:
    if "[THINK]" in template:
        return "mistral"
    if "</think>" not in template:
        return NONE
    # DeepSeek's own token names: models that think before they answer whatever the template says.
    return "deepseek_r1" if "<｜Assistant｜>" in template else "qwen3"
