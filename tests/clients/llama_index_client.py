"""llama-index's OpenAILike: an answer, a stream, a call of a tool, an answer in a schema."""

from __future__ import annotations

import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Trip(BaseModel, extra="forbid"):
    """A trip."""

    city: Literal["Oslo", "Rome"]
    by_train: bool


class Weather(BaseModel, extra="forbid"):
    """How the weather is."""

    city: Literal["Oslo", "Rome"]


model = OpenAILike(
    api_base=f"{sys.argv[1]}/v1", api_key="none", model="tiny", is_chat_model=True, is_function_calling_model=True,
    max_tokens=256, max_retries=0, context_window=8192,
)  # fmt: skip


def weather(city: str) -> str:
    """How the weather is."""
    return city


WEATHER = FunctionTool.from_defaults(weather, fn_schema=Weather)
hello = [ChatMessage(role="user", content="Hello")]
assert model.complete("Hello").text
assert model.chat(hello).message.content
assert "".join(chunk.delta or "" for chunk in model.stream_chat(hello))
answer = model.chat_with_tools([WEATHER], chat_history=hello, tool_required=True)
call, *_ = model.get_tool_calls_from_response(answer)
assert call.tool_name == "weather"
assert call.tool_kwargs["city"] in ("Oslo", "Rome")
shape = {"type": "json_schema", "json_schema": {"name": "trip", "schema": Trip.model_json_schema()}}
Trip.model_validate(json.loads(model.chat(hello, response_format=shape).message.content))
