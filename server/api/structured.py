"""How a client says what the text must be: the fields of it, and the one `Constraint` that they come to.

Knows shapes and which field is to blame; whether a constraint can be enforced is found out where it is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest
from server.types import Choice, Constraint, FreeGrammar, JsonSchema, Regex

MAX_CHOICE_TEXTS = 4096
ANY_OBJECT = JsonSchema('{"type":"object"}')


def _schema_text(value: Any) -> str:
    """A schema as JSON text, its properties in the order given; it may be sent as a string already, as to vLLM."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | bool):
        raise PydanticCustomError("schema", "must be a JSON schema: an object, a boolean or a string that holds one")
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


SchemaText = Annotated[
    str, PlainValidator(_schema_text), WithJsonSchema({"type": ["object", "boolean", "string"], "maxLength": 65_536})
]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)]


class Strict(BaseModel):
    """What every request body is: unknown fields, numbers in strings and NaN are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class JsonSchemaFormat(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: SchemaText = Field(alias="schema", description="Always enforced; what cannot be is refused.")
    description: str | None = Field(default=None, description="Accepted; the prompt does not change.")
    strict: bool | None = Field(default=None, description="Accepted; the schema is enforced either way.")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(default=None, description="With type json_schema only.")


class StructuredOutputs(Strict):
    """vLLM's extension: exactly one of these."""

    json_: SchemaText | None = Field(default=None, alias="json", description="A JSON schema.")
    regex: Text | None = Field(default=None, description="The whole text matches it.")
    choice: Texts | None = Field(default=None, description="The text is one of these.")
    grammar: Text | None = Field(default=None, description="Lark, or GBNF.")
    json_object: bool | None = Field(default=None, description="true: any JSON object.")


class StructuredRequest(Strict):
    """The fields of a request that constrain its text; at most one may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaText | None = Field(default=None, description="Older name of structured_outputs.json.")
    guided_regex: Text | None = Field(default=None, description="Older name of structured_outputs.regex.")
    guided_choice: Texts | None = Field(default=None, description="Older name of structured_outputs.choice.")
    guided_grammar: Text | None = Field(default=None, description="Older name of structured_outputs.grammar.")

    def constraint(self, max_bytes: int) -> tuple[Constraint, str] | None:
        """What the text must be, and the field that says so; None if it is free. InvalidRequest for two of them, or one
        of more than `max_bytes`."""
        found = [*self._constraints()]
        if not found:
            return None
        if len(found) > 1:
            raise InvalidRequest(
                f"'{found[1][1]}': '{found[0][1]}' says already what the text must be; send only one of them",
                param=found[1][1],
            )
        constraint, field = found[0]
        size = sum(len(text.encode()) for text in _texts(constraint))
        if size > max_bytes:
            raise InvalidRequest(
                f"'{field}' must have at most {max_bytes} bytes on this server, got {size}", param=field
            )
        return constraint, field

    def _constraints(self) -> Iterator[tuple[Constraint, str]]:
        if self.response_format is not None:
            yield from _of_format(self.response_format)
        outputs = self.structured_outputs
        if outputs is not None:
            named = [*_of_outputs(outputs)]
            if not named:
                raise InvalidRequest(
                    "'structured_outputs' must hold one of json, regex, choice, grammar and json_object",
                    param="structured_outputs",
                )
            yield from named
        if self.guided_json is not None:
            yield JsonSchema(self.guided_json), "guided_json"
        if self.guided_regex is not None:
            yield Regex(self.guided_regex), "guided_regex"
        if self.guided_choice is not None:
            yield Choice(tuple(self.guided_choice)), "guided_choice"
        if self.guided_grammar is not None:
            yield FreeGrammar(self.guided_grammar), "guided_grammar"


def _of_format(response_format: ResponseFormat) -> Iterator[tuple[Constraint, str]]:
    wanted = response_format.json_schema
    if (response_format.type == "json_schema") != (wanted is not None):
        raise InvalidRequest(
            "'response_format.json_schema' belongs to type json_schema, and only to that",
            param="response_format.json_schema",
        )
    if wanted is not None:
        yield JsonSchema(wanted.schema_), "response_format.json_schema.schema"
    elif response_format.type == "json_object":
        yield ANY_OBJECT, "response_format"


def _of_outputs(outputs: StructuredOutputs) -> Iterator[tuple[Constraint, str]]:
    if outputs.json_ is not None:
        yield JsonSchema(outputs.json_), "structured_outputs.json"
    if outputs.regex is not None:
        yield Regex(outputs.regex), "structured_outputs.regex"
    if outputs.choice is not None:
        yield Choice(tuple(outputs.choice)), "structured_outputs.choice"
    if outputs.grammar is not None:
        yield FreeGrammar(outputs.grammar), "structured_outputs.grammar"
    if outputs.json_object:
        yield ANY_OBJECT, "structured_outputs.json_object"


def _texts(constraint: Constraint) -> tuple[str, ...]:
    match constraint:
        case JsonSchema(text) | Regex(text) | FreeGrammar(text):
            return (text,)
        case Choice(texts):
            return texts
        case _:
            return ()
