"""Qwen3 dense: Llama's form with a norm on each head's queries and keys before rotation, and a head size of its own."""

from __future__ import annotations

from typing import Any

from server.models.decoder import Decoder, DecoderSpec, decoder_spec, layer_windows


class Qwen3(Decoder):
    """Sliding windows as in Qwen2; `attention_bias` covers q, k, v and the output."""

    @staticmethod
    def read_config(config: Any) -> DecoderSpec:
        bias = getattr(config, "attention_bias", False)
        return decoder_spec(config, layer_windows(config), qkv_bias=bias, output_bias=bias, qk_norm=True)
