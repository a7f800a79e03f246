"""What this repository claims, as data: a load, the daemons to compare, and by how much one must beat another.

Ratios are of one arm to the first of its claim, round by round, side by side in the same minutes on the same machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from loadgen.bench import Settings

DEVICE = ("demo", "--device-gib=0.02", "--block-size=64")
"""The packaged demo model; the device tier holds about 7,000 tokens."""
DRAM = ("--dram-gib=0.25",)
SSD = ("--dram-gib=0.02", "--ssd-gib=1", "--ssd-min-free-gib=0", "--ssd-path={disk}")
SLOW_MB_PER_S = 5.0


@dataclass(frozen=True)
class Arm:
    """One daemon of a claim. `{disk}` in a flag becomes a directory of its own."""

    name: str
    flags: tuple[str, ...]
    disk_mb_per_s: float | None = None
    """Slow its SSD down to this."""
    beside: Settings | None = None
    """Work that the daemon does at the same time, not measured."""
    settings: Settings | None = None
    """A load of its own, instead of the claim's."""


@dataclass(frozen=True)
class Goal:
    """A figure of `arm` as a multiple of that of the claim's first arm. The median of the rounds must lie in
    between."""

    arm: str
    most: float
    least: float = 0.0
    latency: str = "ttft"
    """One of `measure.LATENCIES`."""
    quantile: float | None = 0.5
    """Over the requests of a round; None: their mean."""


@dataclass(frozen=True)
class Spare:
    """What `arm` does for others beside the load of the claim's first arm: tokens computed and generated per second, as
    a multiple of what the arm `full` does in the share of time in which the first arm leaves the device idle."""

    arm: str
    full: str
    least: float
    most: float = inf


@dataclass(frozen=True)
class Claim:
    """One benchmark of the suite. The first arm is what the others are held against. Arms with the same flags are the
    same daemon."""

    name: str
    says: str
    settings: Settings
    arms: tuple[Arm, ...]
    goals: tuple[Goal | Spare, ...]
    only_later_turns: bool = False
    """Count TTFT of turns after the first: only there is something to remember."""
    kill: bool = False
    """One daemon: the same load again after kill -9 and a start is the second arm."""
    rounds: int = 3
    remark: str | None = None
    """What the last arm's report must say about its tiers."""

    def quick(self) -> Claim:
        """The same with little load: proves that it runs, measures nothing."""
        few = replace(self.settings, sessions=4, request_rate=4.0)
        arms = tuple(
            arm if arm.settings is None else replace(arm, settings=replace(arm.settings, duration_s=1.0))
            for arm in self.arms
        )
        return replace(self, settings=few, arms=arms)


def _load(workload: str, sessions: int, rate: float, **parameters: object) -> Settings:
    return Settings(workload=workload, parameters={key: str(value) for key, value in parameters.items()},
                    sessions=sessions, request_rate=rate, warmup=2)  # fmt: skip


SHARED = ("demo", "--device-gib=0.1", "--block-size=64", "--threads=1", "--no-prefix-caching",
          "--background-step-ms=5", "--background-slack=0")  # fmt: skip
"""One core computes, the other one is for the client and for HTTP: what batch work takes of the device is measured, not
what its client takes of the machine. Arms ask the same daemon the same, so it must not remember. Whoever comes waits
for half a background step on average, hence short ones."""
BATCH = Settings(workload="random", parameters={"input": "1000", "output": "64"}, sessions=None, duration_s=600.0,
                 max_concurrency=4, warmup=0, body={"service_tier": "flex"})  # fmt: skip

OFF = Arm("tiers off", DEVICE)
WITH_DRAM = Arm("DRAM", DEVICE + DRAM)
WITH_SSD = Arm("DRAM + SSD", DEVICE + SSD)
THROTTLED = Arm("SSD at 5 MB/s", DEVICE + SSD, SLOW_MB_PER_S)

CLAIMS = (
    Claim(
        "multi-turn",
        "Conversations of five turns, more at once than the device tier holds: later turns start sooner.",
        _load("multi-turn", 16, 0.7, turns=5, first=2000, question=50, output=8, think_s=3),
        (OFF, WITH_DRAM, WITH_SSD),
        (Goal("DRAM", 0.5), Goal("DRAM + SSD", 0.6)),
        only_later_turns=True,
    ),
    Claim(
        "idle-resume",
        "Long conversations rest until the device tier has forgotten them, and go on.",
        _load("idle-resume", 16, 1.0, history=3000, question=32, output=8, idle_s=12),
        (OFF, WITH_DRAM, WITH_SSD),
        (Goal("DRAM", 0.4), Goal("DRAM + SSD", 0.5)),
        only_later_turns=True,
    ),
    Claim(
        "restart",
        "The same prompts again after kill -9: what was on SSD is there.",
        _load("random", 20, 2.0, input=3000, output=8),
        (WITH_SSD, Arm("after kill -9", ())),
        (Goal("after kill -9", 0.5),),
        kill=True,
    ),
    Claim(
        "throttled-disk",
        "An SSD too slow to be worth reading: as if it were not there, and the report says so.",
        _load("idle-resume", 16, 1.0, history=1500, question=32, output=8, idle_s=12),
        (OFF, THROTTLED),
        (Goal("SSD at 5 MB/s", 1.05),),
        only_later_turns=True,
        remark="SSD",
    ),
    Claim(
        "shared-prefix",
        "Twelve system prompts in turn, more than the device tier holds.",
        _load("shared-prefix", 60, 3.0, groups=12, prefix=1500, question=50, output=8),
        (OFF, WITH_DRAM, WITH_SSD),
        (Goal("DRAM", 0.6), Goal("DRAM + SSD", 0.7)),
    ),
    Claim(
        "long-documents",
        "Short questions about six documents, more than the device tier holds.",
        _load("long-documents", 40, 2.0, documents=6, document=3000, question=30, output=8),
        (OFF, WITH_DRAM, WITH_SSD),
        (Goal("DRAM", 0.5), Goal("DRAM + SSD", 0.6)),
    ),
    Claim(
        "co-serving",
        "Chats that come in bursts, and batch work without end in what they leave of the device.",
        replace(_load("random", 300, 6.0, input=600, output=32), arrivals="gamma", burstiness=0.25),
        (
            Arm("chats", SHARED),
            Arm("beside batch work", SHARED, beside=BATCH),
            Arm("batch work", SHARED, settings=replace(BATCH, duration_s=15.0)),
        ),
        (
            Goal("beside batch work", 1.1, quantile=None),
            Goal("beside batch work", 1.1, quantile=0.99),
            Goal("beside batch work", 1.1, latency="tpot", quantile=None),
            Goal("beside batch work", 1.1, latency="tpot", quantile=0.99),
            Spare("beside batch work", "batch work", 0.5),
        ),
        rounds=4,
    ),
    Claim(
        "control-no-reuse",
        "Control. Nothing is asked twice: tiers must gain nothing and cost nothing.",
        _load("control-no-reuse", 40, 2.0, input=1000, output=8),
        (OFF, WITH_SSD),
        (Goal("DRAM + SSD", 1.05, 0.95),),
        rounds=7,
    ),
    Claim(
        "control-fits",
        "Control. Everything fits the device tier: lower tiers must gain nothing and cost nothing.",
        _load("control-fits", 60, 3.0, prefix=512, question=50, output=8),
        (OFF, WITH_SSD),
        (Goal("DRAM + SSD", 1.05, 0.95),),
        rounds=7,
    ),
)  # fmt: skip
