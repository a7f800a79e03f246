"""One benchmark of one server, from its settings to its result: warm up, repeat, scrape before and after."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from loadgen.arrivals import arrivals
from loadgen.client import Client, Target
from loadgen.driver import Driver, Load
from loadgen.errors import UsageError
from loadgen.measure import Objectives, merged
from loadgen.prompts import WORDS, IdPrompter, Prompter, TextPrompter
from loadgen.records import Outcome
from loadgen.report import make_document
from loadgen.scrape import scrape, server_section
from loadgen.spread import Spread
from loadgen.workload import RandomLengths, Workload, described, make_workload

CALIBRATION_WORDS = 50
"""In one prompt; all words that prompts are made of are counted."""
WARMUP = RandomLengths(Spread(128), Spread(8))
WARMUP_CONCURRENCY = 4
Progress = Callable[[str, Driver], None]


@dataclass(frozen=True)
class Settings:
    """What to measure. Rates are sessions per second."""

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    """None: the first that the server names."""
    chat: bool = False
    api_key: str | None = None
    workload: str = "random"
    parameters: dict[str, str] = field(default_factory=dict)
    token_ids: tuple[int, int] | None = None
    """Send token ids from the first up to and without the second, and no text."""
    sessions: int | None = 100
    duration_s: float | None = None
    request_rate: float | None = None
    arrivals: str = "poisson"
    burstiness: float = 1.0
    ramp_to: float | None = None
    max_concurrency: int | None = None
    warmup: int = 4
    repeats: int = 1
    seed: int = 0
    goodput: tuple[str, ...] = ()
    timeout_s: float = 600.0
    ignore_eos: bool = True
    body: dict[str, Any] = field(default_factory=dict)
    label: str | None = None

    def shown(self) -> dict[str, Any]:
        """For the result: all but the key."""
        values = asdict(self)
        del values["api_key"]
        return values | {"api": "openai-chat" if self.chat else "openai"}


@dataclass
class Result:
    """The document of `report.make_document` and the requests behind it."""

    document: dict[str, Any]
    outcomes: list[Outcome]

    @property
    def interrupted(self) -> bool:
        return bool(self.document["terrace"]["client"]["interrupted"])

    @property
    def valid(self) -> bool:
        return bool(self.document["terrace"]["client"]["valid"])


async def run(settings: Settings, progress: Progress | None = None) -> Result:
    """Measure. UsageError when the settings do not fit together or the server cannot be used as they say."""
    workload = make_workload(settings.workload, settings.parameters)
    objectives = Objectives.parse(settings.goodput)
    model = settings.model or await first_model(settings)
    client = Client(target_of(settings, model), time.perf_counter)
    try:
        prompter = await _calibrate(client, settings)
        await _warm_up(client, settings, prompter)
        before, started_s = await scrape(settings.base_url, settings.api_key), time.perf_counter()
        runs = []
        for repeat in range(settings.repeats):
            show = None if progress is None else _progress_of(progress, f"{repeat + 1}/{settings.repeats}")
            driver = Driver(client, make_load(settings, workload, prompter, settings.seed + repeat), progress=show)
            runs.append(await driver.run())
            if runs[-1].interrupted:
                break
        seconds = time.perf_counter() - started_s
        after = await scrape(settings.base_url, settings.api_key)
    finally:
        client.close()
    if not any(run.outcomes for run in runs):
        raise UsageError("nothing was sent: the workload is empty, or nothing starts within --duration")
    shown = settings.shown() | {"model": model, "parameters": described(workload)}
    if isinstance(prompter, TextPrompter):
        shown["tokens_per_word"] = round(prompter.tokens_per_word, 4)
    document = make_document(runs, objectives, shown, server_section(before, after, seconds))
    return Result(document, merged(runs))


def target_of(settings: Settings, model: str) -> Target:
    """Where to send, as the client wants it."""
    return Target(settings.base_url, model, settings.chat, settings.api_key, settings.ignore_eos, settings.body,
                  settings.timeout_s)  # fmt: skip


def make_load(settings: Settings, workload: Workload, prompter: Prompter, seed: int) -> Load:
    """One repeat. Each has a seed of its own: what one has left in the cache must not help the next."""
    sessions = workload.sessions(prompter, seed)
    first = next(sessions, None)
    if first is None:
        raise UsageError(f"--workload {settings.workload}: it has no requests")
    sessions = itertools.chain([first], sessions)
    if settings.sessions is None and settings.duration_s is None and not _ends(settings):
        raise UsageError("say how much to send: --num-sessions, --duration, or both")
    if first.start_s is not None and settings.request_rate is not None:
        raise UsageError("--request-rate: this workload has times of its own; use -P speedup=...")
    if first.start_s is None and settings.request_rate is None and settings.max_concurrency is None:
        raise UsageError("say how fast: --request-rate (open loop), --max-concurrency (closed loop), or both")
    when = None
    if settings.request_rate is not None:
        when = arrivals(
            settings.arrivals, rate=settings.request_rate, burstiness=settings.burstiness, ramp_to=settings.ramp_to,
            duration_s=settings.duration_s, seed=seed,
        )  # fmt: skip
    return Load(sessions, settings.sessions, when, settings.duration_s, settings.max_concurrency)


def _ends(settings: Settings) -> bool:
    return settings.workload in ("mooncake", "jsonl")


async def first_model(settings: Settings) -> str:
    """The id of the first model that the server names."""
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    url = settings.base_url.rstrip("/").removesuffix("/v1") + "/v1/models"
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.get(url, headers=headers)
    except httpx.HTTPError as error:
        raise UsageError(f"--base-url {settings.base_url}: {error or type(error).__name__}") from None
    if answer.status_code in (401, 403):
        raise UsageError(f"--base-url {settings.base_url}: the server wants another --api-key-file")
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{url} does not name a model (status {answer.status_code}); give --model") from None


async def _calibrate(client: Client, settings: Settings) -> Prompter:
    """Text as long in tokens as asked for needs the server's own count of one text."""
    if settings.token_ids is not None:
        if settings.chat:
            raise UsageError("--token-ids: chat messages are text; leave out --chat")
        return IdPrompter(*settings.token_ids)
    if settings.workload == "jsonl":
        return TextPrompter()  # it brings its own prompts
    parts = [WORDS[at : at + CALIBRATION_WORDS] for at in range(0, len(WORDS), CALIBRATION_WORDS)]
    one, *counts = [(await _ask(client, " ".join(words))).prompt_tokens for words in (WORDS[:1], *parts)]
    if not one or not all(counts):
        return TextPrompter()  # this server does not count: a word is taken for a token
    return TextPrompter(tokens_per_word=sum(count - one for count in counts) / (len(WORDS) - len(parts)))


async def _ask(client: Client, prompt: str) -> Outcome:
    outcome = Outcome(0, 0, 0.0, 1)
    await client.complete([("user", prompt)], outcome)
    if outcome.error is not None:
        raise UsageError(f"the server does not answer a first request: {outcome.detail}")
    return outcome


async def _warm_up(client: Client, settings: Settings, prompter: Prompter) -> None:
    """Requests that are not counted and share nothing with those that are."""
    if not settings.warmup:
        return
    sessions = WARMUP.sessions(prompter, -1)
    outcomes = (
        await Driver(client, Load(sessions, settings.warmup, max_concurrency=WARMUP_CONCURRENCY)).run()
    ).outcomes
    failed = next((o for o in outcomes if o.error is not None), None)
    if failed is not None and all(o.error is not None for o in outcomes):
        raise UsageError(f"no request of the warm-up succeeded: {failed.detail}")


def _progress_of(progress: Progress, name: str) -> Callable[[Driver], None]:
    return lambda driver: progress(name, driver)


def main_loop() -> Any:
    """uvloop's event loop where it is installed, as it spends less on each chunk. None for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def run_sync(settings: Settings, progress: Progress | None = None, *, partial: bool = False) -> Result:
    """`run`, with an event loop of its own. After Ctrl-C: KeyboardInterrupt, or with `partial` what there is."""
    with asyncio.Runner(loop_factory=main_loop()) as runner:
        result = runner.run(run(settings, progress))
    if result.interrupted and not partial:
        raise KeyboardInterrupt
    return result
