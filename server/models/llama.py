"""Llama 1, 2, 3 and 3.1/3.2 text models, and the many checkpoints of other makers that use their form."""

from __future__ import annotations

from typing import Any

from server.models.decoder import Decoder, DecoderSpec, decoder_spec


class Llama(Decoder):
    """Full attention in every layer; `attention_bias` and `mlp_bias` as the config says."""

    @staticmethod
    def read_config(config: Any) -> DecoderSpec:
        bias = getattr(config, "attention_bias", False)
        return decoder_spec(
            config,
            (None,) * config.num_hidden_layers,
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=getattr(config, "mlp_bias", False),
        )
