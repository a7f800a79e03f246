"""The wire formats of /v1/embeddings, as strict pydantic models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.api.schema import INT31, Prompts, PromptTokensDetails, ShortText, _Response
from server.api.structured import Strict


class EmbeddingRequest(Strict):
    """Body of POST /v1/embeddings."""

    model: ShortText | None = Field(default=None, description="A name from /v1/models; absent: the model served.")
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64: of little-endian float32; default: float."
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=INT31,
        description="The first so many components, scaled to length 1 again; default: all.",
    )
    user: ShortText | None = Field(default=None, description="Accepted; has no effect.")
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, le=INT31, description="Keep each input's last so many tokens; -1: as many as fit."
    )
    add_special_tokens: bool | None = Field(default=None, description="Let the tokenizer add its own; default true.")
    cache_salt: ShortText | None = Field(
        default=None, description="Requests share cached prefixes only with requests of the same salt and API key."
    )
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Lower runs sooner, where the scheduling policy is `priority`."
    )
    service_tier: Literal["auto", "default", "flex", "priority", "fast"] | None = Field(
        default=None, description="flex: in the background, on what other requests leave idle; all others are alike."
    )


class Embedding(_Response):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Response):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingResponse(_Response):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
