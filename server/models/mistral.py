"""Mistral: Llama's form with one sliding window for all layers (7B v0.1), or none (later ones)."""

from __future__ import annotations

from typing import Any

from server.models.decoder import Decoder, DecoderSpec, decoder_spec


class Mistral(Decoder):
    """No biases; `sliding_window` (or null) holds in every layer."""

    @staticmethod
    def read_config(config: Any) -> DecoderSpec:
        return decoder_spec(config, (getattr(config, "sliding_window", None),) * config.num_hidden_layers)
