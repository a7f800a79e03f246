"""Loading: every layout a checkpoint comes in, and an answer that helps for everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import ConfigError
from server.models.weights import load_config, load_model, resolve_folder
from tests.numeric.conftest import Checkpoint
from tests.numeric.families import Paged, save
from tests.numeric.test_models import random_tokens, reference_logits

TOKENS = random_tokens(40, seed=9)


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a tiny llama2 checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama2")[0], tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) drops tensors; names are given with __ for dots."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, path)


def logits(folder: Path, **options: object) -> torch.Tensor:
    return Paged(load_model(folder, **options)).logits(TOKENS, 40)  # type: ignore[arg-type]


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_shards(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A sharded checkpoint loads like a single file."""
    whole, reference = checkpoint("qwen3")
    sharded = save(reference, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(sharded), logits(whole))


def test_fused_projections(folder: Path) -> None:
    """A checkpoint that already carries fused qkv_proj and gate_up_proj tensors loads like one that does not."""
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        for whole, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            block = f"model.layers.{layer}.{whole.split('.')[0]}."
            stacked = [tensors.pop(f"{block}{part}_proj.weight") for part in parts]
            tensors[f"model.layers.{layer}.{whole}_proj.weight"] = torch.cat(stacked)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_tied_embeddings_ignore_a_stored_head(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With tied embeddings a stored lm_head is the same matrix again, and is not read."""
    source, _ = checkpoint("qwen2")
    copy = Path(shutil.copytree(source, tmp_path / "model"))
    edit_tensors(copy, lm_head__weight=torch.full((256, 64), float("nan")))
    model = load_model(copy)
    assert model.geometry.vocab == 256
    assert torch.equal(logits(copy), logits(source))


def test_derived_buffers_are_skipped(folder: Path) -> None:
    """Rotary frequencies that old checkpoints store are recomputed, not read."""
    expected = logits(folder)
    edit_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    assert torch.equal(logits(folder), expected)


def test_older_rope_settings(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`rope_theta` beside `rope_scaling`, as configs were written before transformers 5, mean the same."""
    source, _ = checkpoint("llama3.1")
    copy = Path(shutil.copytree(source, tmp_path / "model"))
    settings = json.loads((copy / "config.json").read_text())["rope_parameters"]
    theta = settings.pop("rope_theta")
    edit_config(copy, rope_parameters=..., rope_theta=theta, rope_scaling=settings)
    assert torch.equal(logits(copy), logits(source))


def test_a_config_without_architectures(folder: Path) -> None:
    """The model type stands in for a missing `architectures`."""
    expected = logits(folder)
    edit_config(folder, architectures=...)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(("stored", "asked", "got"), [
    ("bfloat16", "auto", torch.bfloat16),
    ("float16", "auto", torch.float16),
    ("float16", "float32", torch.float32),
    (..., "auto", torch.float32),
])  # fmt: skip
def test_dtype(folder: Path, stored: object, asked: str, got: torch.dtype) -> None:
    """`auto` is the config's dtype, or the stored tensors' where the config is silent; others convert while loading."""
    edit_config(folder, dtype=stored)
    assert load_model(folder, dtype=asked).dtype == got  # type: ignore[arg-type]


def test_half_precision_files_under_fp32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A bf16 checkpoint loaded as fp32 computes in fp32 on the rounded weights."""
    _, reference = checkpoint("qwen2.5")
    rounded = type(reference)(reference.config)
    rounded.load_state_dict({name: value.bfloat16() for name, value in reference.state_dict().items()})
    expected = reference_logits(rounded, TOKENS)
    copy = save(rounded.bfloat16(), tmp_path / "model")
    assert (logits(copy, dtype="float32") - expected).abs().max() <= 1e-4 * expected.std()


def test_progress(folder: Path) -> None:
    """Progress grows to the total, which is the size of the parameters."""
    seen: list[tuple[int, int]] = []
    model = load_model(folder, progress=lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    assert totals == {sum(parameter.nbytes for parameter in model.parameters().values())}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


# -- random weights --------------------------------------------------------------------------------------------------


def test_dummy_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """From a config alone: logits are finite, of order one, depend on the seed and on nothing else."""
    for name in ("llama2", "qwen2", "qwen3"):
        bare = tmp_path / name
        bare.mkdir()
        shutil.copy(checkpoint(name)[0] / "config.json", bare)
        first, again, other = (logits(bare, load_format="dummy", seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert 0.3 < first.std() < 3
        assert first.argmax(-1).unique().numel() > 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dummy_weights_in_half_precision(folder: Path, dtype: str) -> None:
    """Random weights come in any dtype."""
    model = load_model(folder, load_format="dummy", dtype=dtype)  # type: ignore[arg-type]
    out = Paged(model, kv_dtype=model.dtype).logits(TOKENS, 40)
    assert out.isfinite().all()
    assert 0.3 < out.std() < 3


# -- what can be wrong -----------------------------------------------------------------------------------------------


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(folder)
    for word in words:
        assert word in caught.value.message


def test_no_config(tmp_path: Path) -> None:
    """A folder without config.json is no model folder."""
    refuses(tmp_path, "config.json", "model folder")


def test_config_that_is_no_json(folder: Path) -> None:
    """A config.json that cannot be parsed is named."""
    (folder / "config.json").write_text("{")
    refuses(folder, "config.json", "cannot be read")


def test_unsupported_architecture(folder: Path) -> None:
    """An architecture that is not supported is answered with those that are."""
    edit_config(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    refuses(folder, "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM")
    edit_config(folder, architectures=["LlamaForSequenceClassification"], model_type="llama")
    refuses(folder, "LlamaForSequenceClassification")


def test_unsupported_quantisation(folder: Path) -> None:
    """A method that quantised the checkpoint and is not known is answered with those that are."""
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refuses(folder, "bitsandbytes", "awq, compressed-tensors, fp8, gptq")


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_act": "gelu"}, ("gelu", "silu")),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                          "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}}, ("longrope", "llama3")),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ("partial",)),
    ({"num_key_value_heads": 3}, ("4 attention heads", "3 key/value heads")),
    ({"hidden_size": "wide"}, ("config.json", "hidden_size")),
])  # fmt: skip
def test_unsupported_settings(folder: Path, changes: dict[str, object], words: tuple[str, ...]) -> None:
    """A setting that would silently change the computation is refused and named."""
    edit_config(folder, **changes)
    refuses(folder, *words)


def test_no_weights(folder: Path) -> None:
    """A folder without weights says which files it looked for, and that dummy weights exist."""
    (folder / "model.safetensors").unlink()
    refuses(folder, "model.safetensors.index.json", "dummy")


def test_pickled_weights(folder: Path) -> None:
    """Pickled weights can run code: refused, with the way out."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "pytorch_model.bin", "safetensors", "save_pretrained")


def test_missing_shard(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A shard that the index lists and the folder lacks is named."""
    sharded = save(checkpoint("llama2")[1], tmp_path / "sharded", max_shard_size="100KB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    refuses(sharded, lost.name, "lacks 1 of")


def test_index_without_map(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """An index that lists nothing is damaged."""
    sharded = save(checkpoint("llama2")[1], tmp_path / "sharded", max_shard_size="100KB")
    (sharded / "model.safetensors.index.json").write_text("{}")
    refuses(sharded, "weight_map")


def test_file_cut_short(folder: Path) -> None:
    """A file cut short by a broken download is named."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses(folder, "model.safetensors", "cut short")


def test_missing_tensor(folder: Path) -> None:
    """Tensors that the model needs and the files lack are named; a missing head has its likely cause."""
    edit_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    refuses(folder, "model.layers.1.mlp.up_proj.weight")
    edit_tensors(folder, lm_head__weight=None)
    refuses(folder, "lm_head.weight", "tie_word_embeddings")


def test_surplus_tensor(folder: Path) -> None:
    """A tensor without a place in the model (here a bias that the config does not announce) is refused, not ignored."""
    edit_tensors(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    refuses(folder, "model.layers.0.self_attn.q_proj.bias", "no place")


def test_wrong_shape(folder: Path) -> None:
    """A tensor of the wrong shape is named with both shapes."""
    edit_tensors(folder, model__norm__weight=torch.zeros(63))
    refuses(folder, "model.norm.weight", "[63]", "[64]")


def test_wrong_fused_shape(folder: Path) -> None:
    """A fused tensor of the wrong height is named with its shape."""
    names = {f"model__layers__0__mlp__{part}_proj__weight": None for part in ("gate", "up")}
    edit_tensors(folder, **names, model__layers__0__mlp__gate_up_proj__weight=torch.zeros(100, 64))
    refuses(folder, "gate_up_proj", "[100, 64]", "192")


# -- finding the folder ----------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(folder: Path) -> None:
    """A local path needs no hub."""
    assert resolve_folder(str(folder)) == folder
    assert load_config(folder).model_type == "llama"


@pytest.mark.parametrize("offline", [False, True])
def test_not_in_the_cache(offline: bool) -> None:
    """Without network, a hub id that is not in the cache says how to bring it there (tests run in offline mode)."""
    with pytest.raises(ConfigError, match=r"hf download some-owner/no-such-model.*or pass a folder"):
        resolve_folder("some-owner/no-such-model", offline=offline)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", ""])
def test_neither_folder_nor_hub_id(model: str) -> None:
    """What can be neither a folder nor a hub id is not looked up."""
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        resolve_folder(model)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    """Pointing at the weights file rather than its folder is answered with what to point at."""
    with pytest.raises(ConfigError, match=r"folder that holds config\.json"):
        resolve_folder(str(folder / "model.safetensors"))


def test_a_cached_snapshot_is_found_offline(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that `hf download` left in the hub cache is served without network."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint("llama2")[0], repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = resolve_folder("owner/tiny", offline=True)
    assert (found / "config.json").is_file()
    assert load_model(found).geometry.layers == 3
