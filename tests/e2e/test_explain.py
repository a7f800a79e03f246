"""What a real daemon says of a request: where its prompt came from, and what was decided of each tier."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.daemon import ServerThread, tiny_config


def test_a_request_that_came_back_from_dram_is_explained(model_folder: Path) -> None:
    """The same prompt computed, then found on the device, then below it: each answer says so by its id, tokens by
    source are the prompt, and what lay in DRAM was decided on with both estimates."""
    config = tiny_config(model_folder, **{"kv.device_gib": 0.4 / 1024, "kv.dram_gib": 4 / 1024})
    prompt = list(range(1, 161))
    with ServerThread(config) as served, served.client() as http:

        def ask(name: str, ids: list[int]) -> None:
            body = {"prompt": ids, "max_tokens": 2, "temperature": 0}
            assert http.post("/v1/completions", json=body, headers={"X-Request-Id": name}).status_code == 200

        def why(name: str) -> dict:
            (found,) = http.get(f"/v1/cache/explain/{name}").json()["requests"]
            assert sum(found["prompt_tokens_by_source"].values()) == found["prompt_tokens"] == len(prompt)
            return found

        ask("first", prompt)
        assert why("first")["prompt_tokens_by_source"] == {"computed": 160}
        ask("again", prompt)
        assert why("again")["prompt_tokens_by_source"] == {"computed": 16, "device": 144}
        for number in range(12):
            ask(f"other-{number}", [number + 1] * 300)
        ask("back", prompt)
        back = why("back")
        assert [decision["tier"] for decision in back["decisions"]] == ["dram"]
        (decision,) = back["decisions"]
        assert decision["load_s"] > 0
        assert decision["compute_s"] > 0
        loaded = back["prompt_tokens_by_source"].get("dram", 0)
        assert loaded + sum(back["cached_but_computed_tokens"].values()) == decision["tokens"]
        assert (decision["decision"] == "load") == (decision["reason"] == "")
        latest = http.get("/v1/cache/explain", params={"limit": 1}).json()["requests"]
        assert [found["request_id"] for found in latest] == ["back"]
