"""langchain-openai: an answer, a stream, a call of a tool, an answer in a schema."""

from __future__ import annotations

import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Trip(BaseModel, extra="forbid"):
    """A trip."""

    city: Literal["Oslo", "Rome"]
    by_train: bool


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """How the weather is."""
    return city


model = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", model="tiny", max_tokens=256, max_retries=0)
said = model.invoke("Hello")
assert said.content, said
assert said.usage_metadata["output_tokens"] > 0
assert "".join(chunk.content for chunk in model.stream("Hello"))
[call] = model.bind_tools([weather], tool_choice="weather").invoke("Oslo?").tool_calls
assert call["name"] == "weather"
assert call["args"]["city"] in ("Oslo", "Rome")
trip = model.with_structured_output(Trip, method="json_schema").invoke("Where?")
assert isinstance(trip, Trip)
