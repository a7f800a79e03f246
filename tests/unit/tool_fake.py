"""Four families of models that call tools: their templates and control tokens, and a server with a scripted reply."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from server.api.dialects.dialect import dialect_of
from server.engine import GenerateSpec
from server.runner.grammar import Grammars, Vocabulary
from server.text import Tokenizer
from tests.unit.api_fake import FakeEngine, make_app

HTTP = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
"""The HTTP library that the package brings: its versions differ in that."""
END = "<|end|>"
HERMES = """
{%- if tools %}tools:{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n' }}
{{- 'Calls look like <tool_call>{"name": ..., "arguments": ...}</tool_call>.\\n' }}{% endif %}
{%- for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name else '' }}]
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{
 call.function.arguments | tojson }}}</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}
{%- for d in documents or [] %}({{ d.title }}){% endfor %}
{%- if add_generation_prompt %}[assistant]{% if enable_thinking is false %}<think></think>{% endif %}
{%- if begin_thinking %}<think>{% endif %}{% endif %}"""
MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}={{ m.content }}[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS]{% for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}
{%- else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"""
LLAMA = """
{%- if tools %}You may call {% for tool in tools %}{{ tool.function.name }} {% endfor %} by <|python_tag|>.{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}"""
PYTHONIC = LLAMA.replace("<|python_tag|>", "<|python_start|>")
TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "llama3": LLAMA, "pythonic": PYTHONIC}
CONTROL = {
    "hermes": (),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "llama3": ("<|python_tag|>",),
    "pythonic": ("<|python_start|>", "<|python_end|>"),
}
"""Markers that are control tokens of the family's vocabulary. Those of hermes are ordinary tokens."""
REPLIES = {
    "hermes": 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Tromsø"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "mistral": 'I look.[TOOL_CALLS]weather[ARGS]{"city": "Tromsø"}[TOOL_CALLS]now[ARGS]{}',
    "llama3": 'I look.<|python_tag|>{"name": "weather", "parameters": {"city": "Tromsø"}}; '
    '{"name": "now", "parameters": {}}',
    "pythonic": "I look.<|python_start|>[weather(city='Tromsø'), now()]<|python_end|>",
}
FAMILIES = sorted(TEMPLATES)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, NOW]
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WRONG = HERMES_CALL.replace("city", "town")
STRICT = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
HI: Any = [{"role": "user", "content": "hi"}]


def byte_tokenizer(template: str, control: Sequence[str], plain: Sequence[str] = ()) -> Tokenizer:
    """A token per byte, `control` tokens and the `plain` added tokens, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={name: index for index, name in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (END, *control)])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=template)
    return Tokenizer(fast, folder=Path("nowhere"))


TOKENIZERS = {
    family: byte_tokenizer(template, CONTROL[family], ["<tool_call>", "</tool_call>", "<think>", "</think>"])
    for family, template in TEMPLATES.items()
}


class World:
    """One family's server with a scripted reply, and a client for it."""

    def __init__(self, family: str, reply: str, burst: int = 1, **app: Any) -> None:
        self.tokenizer = TOKENIZERS[family]
        self.engine = FakeEngine(self._says(reply), max_model_len=8192)
        self.engine.burst = burst
        dialect = dialect_of(self.tokenizer, **app.pop("parsers", {}))
        self.app = make_app(self.engine, tokenizer=self.tokenizer, dialect=dialect, **app)

    def _says(self, reply: str) -> Any:
        ids = self.tokenizer.encode(reply + END, add_special_tokens=False)

        def script(spec: GenerateSpec) -> Iterator[int]:
            while True:
                yield from ids

        return script

    @asynccontextmanager
    async def client(self) -> AsyncIterator[openai.AsyncOpenAI]:
        async with HTTP.AsyncClient(transport=HTTP.ASGITransport(self.app)) as transport:
            yield openai.AsyncOpenAI(base_url="http://t/v1", api_key="none", max_retries=0, http_client=transport)

    async def ask(self, messages: Any = HI, **more: Any) -> Any:
        async with self.client() as client:
            return await client.chat.completions.create(model="fake", messages=messages, **more)

    async def stream(self, messages: Any = HI, **more: Any) -> list[Any]:
        async with self.client() as client:
            stream = await client.chat.completions.create(model="fake", messages=messages, stream=True, **more)
            return [chunk async for chunk in stream]

    def prompt(self, index: int = -1) -> str:
        """What the engine was asked to go on from."""
        return self.tokenizer.decode(self.engine.submitted[index].prompt, skip_special_tokens=False)

    def holds(self, text: str) -> bool:
        """Whether the constraint on the last request allows `text` as a whole."""
        grammar = self.engine.submitted[-1].params.grammar
        assert grammar is not None
        matcher = grammar.start()
        return bool(
            matcher.consume_tokens(self.tokenizer.encode(text, add_special_tokens=False)) and matcher.is_accepting()
        )


def world_with_grammars(family: str, reply: str = "ok", **limits: Any) -> World:
    tokenizer = TOKENIZERS[family]
    vocabulary = Vocabulary(tokenizer.vocabulary(tokenizer.vocab_size), tokenizer.special_tokens)
    return World(family, reply, grammars=Grammars(vocabulary), **limits)
