"""Qwen2 and Qwen2.5 dense: Llama's form with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from server.models.decoder import Decoder, DecoderSpec, decoder_spec, layer_windows


class Qwen2(Decoder):
    """Sliding windows where `layer_types` (or `use_sliding_window` with `max_window_layers`) says so."""

    @staticmethod
    def read_config(config: Any) -> DecoderSpec:
        return decoder_spec(config, layer_windows(config), qkv_bias=True)
