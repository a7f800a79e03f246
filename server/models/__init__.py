"""Model families, by the name a checkpoint's config.json gives in `architectures[0]`. Resolved lazily."""

from __future__ import annotations

MODELS: dict[str, str] = {
    "LlamaForCausalLM": "server.models.llama:Llama",
    "MistralForCausalLM": "server.models.mistral:Mistral",
    "Qwen2ForCausalLM": "server.models.qwen2:Qwen2",
    "Qwen3ForCausalLM": "server.models.qwen3:Qwen3",
}
