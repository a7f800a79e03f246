"""`python gguf_file.py FOLDER FILE PRECISION`: a checkpoint of `shapes.py` as GGUF. Runs in llama.cpp's environment.

Matrices get the precision that is asked for; vectors stay float32, as in llama.cpp's own conversion.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PRECISIONS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight` there."""
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    assert found, name
    return ("" if found[1] is None else f"blk.{found[1]}.") + NAMES[found[2]] + ".weight"


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of a Llama's query or key weights as llama.cpp rotates them: neighbours are a pair, where Hugging Face pairs
    the halves of a head. `weight` [heads * head_dim, hidden]."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main(folder: Path, target: Path, precision: str) -> None:
    """Write `target`, whole or not at all."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, config["model_type"])
    _describe(writer, config)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), config)
    kind = gguf.GGMLQuantizationType[PRECISIONS[precision]]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dict
            value = tensors.get_tensor(name)
            part = name.split(".")[-2]
            if config["model_type"] == "llama" and part in heads:
                value = interleaved(value, heads[part])
            if value.ndim == 1 or precision == "fp32":
                writer.add_tensor(gguf_name(name), value)
            else:
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_name(config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    specials = [token["content"] for token in tokenizer["added_tokens"]]
    vocab = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(vocab, key=vocab.__getitem__), *specials])
    normal, control = 1, 3
    writer.add_token_types([normal] * len(vocab) + [control] * len(specials))
    writer.add_token_merges(tokenizer["model"]["merges"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
