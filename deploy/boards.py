"""What the two Grafana boards show: one entry per panel. `python -m deploy.boards` writes their JSON.

Only sums are divided, averages are never averaged, and quantiles come from buckets.
"""

from __future__ import annotations

from pathlib import Path

from deploy.panels import Board, Panel, as_json

FOLDER = Path(__file__).parent / "grafana"


def rate(metric: str, *by: str) -> str:
    """Per second; summed over all labels but `by`."""
    return f"sum by ({', '.join(by)}) (rate({metric}[$i]))" if by else f"sum(rate({metric}[$i]))"


def share(metric: str, *by: str) -> str:
    """Of the time of a daemon, on average over those picked."""
    return f"{rate(metric, *by)} / on () group_left () count(terrace_requests_running)"


def quantile(q: float, metric: str, *by: str) -> str:
    """At most so long it took for the share `q` of all."""
    return f"histogram_quantile({q:g}, {rate(metric + '_bucket', *by, 'le')})"


def quantiles(metric: str) -> dict[str, str]:
    return {f"p{q * 100:g}": quantile(q, metric) for q in (0.5, 0.9, 0.99)}


def mean(metric: str, by: str) -> str:
    return f"{rate(metric + '_sum', by)} / {rate(metric + '_count', by)}"


def target(slo: str) -> dict[str, str]:
    """The line that should not be crossed, where there is one."""
    return {"target": f'max(terrace_slo_threshold_seconds{{slo="{slo}"}} > 0)'}


ATTAINED = (
    'sum by (slo) (increase(terrace_slo_requests_total{result="good"}[30d]))'
    " / sum by (slo) (increase(terrace_slo_requests_total[30d]))"
)
BUDGET_LEFT = f"1 - (1 - {ATTAINED}) / (1 - scalar(terrace:slo_objective:ratio))"
UP_S = "min((time() - process_start_time_seconds) and on (instance) terrace_build_info)"
BY_CLASS = 'sum by (class) (label_replace(rate(terrace_http_requests_total[$i]), "class", "${1}xx", "code", "(.).*"))'
HIT_RATIO = (
    f"{rate('terrace_kv_hit_tokens_total', 'tier')} / on () group_left () {rate('terrace_kv_lookup_tokens_total')}"
)
SAVED = (
    f"{rate('terrace_kv_recompute_avoided_seconds_total', 'tier')}"
    f" - {rate('terrace_kv_restore_cost_seconds_total', 'tier')}"
)
MOVED = rate("terrace_kv_transfer_bytes_total", "src", "dst")
MOVING = rate("terrace_kv_transfer_busy_seconds_total", "src", "dst")
HELD = 'terrace_kv_blocks{state=~"referenced|in_flight"}'
FILL = "sum by (tier) (terrace_kv_used_bytes) / sum by (tier) (terrace_kv_capacity_bytes)"

SERVING = Board(
    "terrace-serving",
    "Terrace: is it serving well?",
    "State, objectives, latency by phase and by where the cache came from, load, refusals.",
    {
        "Now": (
            Panel("State", "none", "What the daemons are doing.", {"{{state}}": "sum by (state) (terrace_state) > 0"},
                  "name", 4),
            Panel("Up for", "s", "Age of the youngest process.", {"": UP_S}, "number", 4),
            Panel("Version", "none", "More than one: a roll-out is under way.",
                  {"{{version}}": "count by (version) (terrace_build_info)"}, "name", 4),
            Panel("Objectives met, 30 days", "percentunit", "Share of requests that met each target.",
                  {"{{slo}}": ATTAINED}, "number", 6),
            Panel("Error budget left, 30 days", "percentunit", "1: nothing is spent; below 0: the objective is missed.",
                  {"{{slo}}": BUDGET_LEFT}, "number", 6),
        ),
        "Are requests served in time?": (
            Panel("Requests and goodput", "reqps", "Goodput: requests that met all targets. Below what ends: too slow.",
                  {"ended": rate("terrace_requests_finished_total"),
                   "goodput": rate('terrace_slo_requests_total{slo="all", result="good"}')}),
            Panel("Time to first token", "s", "Received to first token, and the target.",
                  quantiles("terrace_time_to_first_token_seconds") | target("ttft"), log=True),
            Panel("Time to first token, p99, by where KV came from", "s", "By the slowest tier that a request drew on; "
                  "none: all was computed. The queue counts for all. A tier that stays above `none` does not pay.",
                  {"{{kv_source}}": quantile(0.99, "terrace_time_to_first_token_seconds", "kv_source")}, log=True),
            Panel("Time per output token", "s", "Mean gap between the tokens of a request, and the target.",
                  quantiles("terrace_request_time_per_output_token_seconds") | target("tpot"), log=True),
            Panel("Gap between tokens", "s", "Every gap by itself: stutters that means hide.",
                  quantiles("terrace_inter_token_latency_seconds"), log=True),
            Panel("Where a request's time goes", "s", "Mean time of a request in each phase.",
                  {"{{phase}}": mean("terrace_request_phase_seconds", "phase")}, "stack"),
        ),
        "How much is there to do?": (
            Panel("Requests in the daemon", "short", "Running, and waiting by what for.",
                  {"running": "sum(terrace_requests_running)",
                   "waiting: {{reason}}": "sum by (reason) (terrace_requests_waiting)"}, "stack"),
            Panel("Prompt tokens by source", "short", "Tokens per second, by what provided their KV.",
                  {"{{source}}": rate("terrace_prompt_tokens_by_source_total", "source")}, "stack"),
            Panel("Tokens generated", "short", "Tokens per second.",
                  {"generated": rate("terrace_generation_tokens_total")}),
            Panel("What the engine does", "percentunit", "Share of time in forward passes, in planning them, and with "
                  "work of which none could run.",
                  {"forward": share("terrace_engine_busy_seconds_total"),
                   "planning": share("terrace_engine_host_seconds_total"),
                   "stalled": share("terrace_engine_stall_seconds_total")}),
            Panel("Device frames in use", "percentunit", "By running requests; the rest holds what may be used again. "
                  "At 1 requests wait or are preempted.", {"{{instance}}": "terrace_kv_cache_usage_ratio"}),
            Panel("Tokens per step", "short", "Size of the batches.",
                  {f"p{q}": quantile(q / 100, "terrace_engine_batch_tokens") for q in (50, 99)}, log=True),
        ),
        "What goes wrong?": (
            Panel("How requests end", "reqps", "By reason.",
                  {"{{finish_reason}}": rate("terrace_requests_finished_total", "finish_reason")}, "stack"),
            Panel("Refused before they waited", "reqps", "By reason: no room, too late, over a limit, shutting down.",
                  {"{{reason}}": rate("terrace_admission_rejections_total", "reason")}, "stack"),
            Panel("HTTP answers", "reqps", "By class of status.", {"{{class}}": BY_CLASS}),
            Panel("Preemptions", "ops", "Running requests that lost their frames: the device tier is too small for "
                  "what runs at once.", {"{{action}}": rate("terrace_preemptions_total", "action")}, width=12),
            Panel("Event loop lag, p99", "s", "How late the loop's timers fire. Above 0.25 s answers come in lumps.",
                  {"p99": quantile(0.99, "terrace_event_loop_lag_seconds")}, width=12, log=True),
        ),
    },
)  # fmt: skip

TIERING = Board(
    "terrace-tiering",
    "Terrace: is the tiering paying?",
    "What the tiers hold and serve, the seconds that this saves and costs, transfers, evictions, the disk.",
    {
        "Does it pay?": (
            Panel("Seconds saved per second", "none", "Prefill avoided (an estimate, by the measured rate) less what "
                  "requests waited for. Below 0 a tier costs more than it saves.", {"{{tier}}": SAVED}, signed=True),
            Panel("Hit ratio by tier", "percentunit", "Of the prompt tokens looked up, each counted once, at the tier "
                  "that served it.", {"{{tier}}": HIT_RATIO}, "stack"),
            Panel("Why tokens were computed", "short", "Tokens per second that no tier served, by reason.",
                  {"{{reason}}": rate("terrace_kv_miss_tokens_total", "reason")}, "stack"),
            Panel("What would twice the room buy?", "short", "Tokens per second that were dropped, and would be there "
                  "if the tier were twice as large.", {"{{tier}}": rate("terrace_kv_ghost_hit_tokens_total", "tier")}),
            Panel("Restore latency", "s", "Found below the device until usable on it, per request.",
                  {f"{{{{tier}}}} p{q}": quantile(q / 100, "terrace_kv_restore_seconds", "tier") for q in (50, 99)},
                  log=True),
            Panel("Engine stalled", "percentunit", "Share of time with work of which none could run, by cause.",
                  {"{{cause}}": share("terrace_engine_stall_seconds_total", "cause")}, "stack"),
        ),
        "What is where?": (
            Panel("Fill", "percentunit", "Of a tier's bytes. Full is normal: a cache is to be full.",
                  {"{{tier}}": FILL}, "bars"),
            Panel("Blocks held", "short", "Used by running requests, or arriving. The rest of a tier may go.",
                  {"{{tier}}, {{state}}": f"sum by (tier, state) ({HELD})"}),
            Panel("Evictions", "ops", "Blocks per second that left a tier for want of room, and those of any tier that "
                  "had to go otherwise.",
                  {"{{tier}}": rate('terrace_kv_evicted_blocks_total{reason="capacity"}', "tier"),
                   "any tier: {{reason}}": rate('terrace_kv_evicted_blocks_total{reason!="capacity"}', "reason")}),
            Panel("Age at eviction", "s", "Last use to eviction. What goes within seconds was written in vain.",
                  {"{{le}}": "sum by (le) (increase(terrace_kv_eviction_age_seconds_bucket[$i]))"}, "heatmap"),
            Panel("Evicted, then asked for again", "s", "How long after, median. Short: a little more room would do.",
                  {"{{tier}}": quantile(0.5, "terrace_kv_evict_to_reuse_seconds", "tier")}, log=True),
            Panel("Prefetched blocks", "ops", "By what became of them.",
                  {"{{outcome}}": rate("terrace_kv_prefetch_blocks_total", "outcome")}, "stack"),
        ),
        "What moves?": (
            Panel("Transfers", "Bps", "From tier to tier.", {"{{src}} to {{dst}}": MOVED}, width=6),
            Panel("Speed while moving", "Bps", "Per second with a move in flight: what the medium gives.",
                  {"{{src}} to {{dst}}": f"{MOVED} / {MOVING}"}, width=6, log=True),
            Panel("In flight", "short", "Blocks on their way.",
                  {"{{src}} to {{dst}}": "sum by (src, dst) (terrace_kv_transfers_in_flight)"}, width=6),
            Panel("Queued", "bytes", "What waits to move. If it stays, the medium is the limit.",
                  {"{{src}} to {{dst}}": "sum by (src, dst) (terrace_kv_transfer_queue_bytes)"}, width=6),
        ),
        "Is the disk well, and how long will it live?": (
            Panel("Written to SSD per day", "bytes", "At the pace of the last hour, and the budget if there is one.",
                  {"written": "sum(rate(terrace_ssd_written_bytes_total[1h])) * 86400",
                   "budget": "sum(terrace_ssd_write_budget_bytes_per_day > 0)"}),
            Panel("Decisions to write", "ops", "Blocks on their way down to SSD: admitted or not, and why.",
                  {"{{decision}}": rate('terrace_kv_admission_total{tier="ssd"}', "decision")}, "stack"),
            Panel("SSD latency, p99", "s", "Per read and write, each of one run of blocks.",
                  {"{{op}}": quantile(0.99, "terrace_ssd_io_seconds", "op")}, log=True),
            Panel("Tiers in use", "none", "0: switched off because it fails or stalls.",
                  {"{{tier}}": "min by (tier) (terrace_kv_tier_up)"}),
            Panel("Transfers that failed", "ops", "By reason. Requests compute instead.",
                  {"{{reason}}": rate("terrace_kv_transfer_failures_total", "reason")}),
            Panel("Blocks that did not verify", "ops", "Refused and computed again. One is enough to look at the disk.",
                  {"{{tier}}: {{kind}}": rate("terrace_kv_integrity_failures_total", "tier", "kind")}),
        ),
    },
)  # fmt: skip

BOARDS = {"serving.json": SERVING, "tiering.json": TIERING}
"""By file in `grafana/`."""


def main() -> None:
    """Write both."""
    for name, board in BOARDS.items():
        (FOLDER / name).write_text(as_json(board), encoding="utf-8")


if __name__ == "__main__":
    main()
