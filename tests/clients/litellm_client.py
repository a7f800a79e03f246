"""litellm: an answer, a stream, a call of a tool, an answer in a schema."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import litellm
from pydantic import BaseModel


class Trip(BaseModel, extra="forbid"):
    """A trip."""

    city: Literal["Oslo", "Rome"]
    by_train: bool


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def ask(**more: Any) -> Any:
    """One chat of one message."""
    return litellm.completion(
        "openai/tiny", [{"role": "user", "content": "Hello"}], api_base=f"{sys.argv[1]}/v1", api_key="none",
        max_tokens=256, num_retries=0, **more,
    )  # fmt: skip


assert ask().choices[0].message.content
assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
[call] = ask(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
assert call.function.name == "weather"
assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
Trip.model_validate_json(ask(response_format=Trip).choices[0].message.content)
