"""`terrace serve`: the daemon as a process, from binding its port to the exit code. Loop thread.

Start: take the port and answer on it (alive, not ready, how far it is), build the daemon in a thread beside it, then
take requests. End: the first SIGTERM or SIGINT drains, the second aborts what runs, and whatever does not end by then
is left behind: the SSD tier is made for that.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from server.api.app import create_app
from server.api.connections import Doors, may_connect
from server.api.inprocess import InProcess
from server.api.service import Service
from server.api.starting import Front, Starting
from server.api.status.warnings import LOGGER, WarningLog
from server.batches.runner import Runner
from server.build import Daemon, build, model_name, service_of
from server.config import Config, supervisor
from server.errors import ConfigError
from server.kvcache.tiers.files import OsIo
from server.logs import configure_logging, set_level
from server.metrics import Metrics
from server.notify import Notifier
from server.startup import Startup
from server.watchdog import STDERR, Watchdog, describe, dump_stacks

log = logging.getLogger("terrace")

LAG_PROBE_S = 0.1
FILES_PROBE_S = 30.0
"""How often to look whether the model's files are those that were loaded."""
END_MARGIN_S = 10.0
"""After a drain's time, for closing sockets and files; what then still runs is left behind."""
ABORT_S = 5.0
"""The same after a second signal."""
PORTS_OF_ALL, PORTS_TRIED = 1024, 100
"""From where on anybody may listen, and how many to try in search of a free one to name."""
GC_THRESHOLDS = (50_000, 20, 20)
"""A step of 256 rows makes about 1,000 objects that live for one step: with the default of 700 the collector would run
in every one of them, and a full collection over a large cache takes longer than a step."""


async def serve(config: Config, disk: OsIo | None = None, again: Callable[[], Config] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit code: 0 after a clean drain, 1 when the engine failed or the end
    took too long. `disk` as in `build`; `again` reads the configuration anew, from where `config` came from."""
    configure_logging(config.server.log_level, config.server.log_format)
    warnings = WarningLog()
    logging.getLogger(LOGGER).addHandler(warnings)
    faulthandler.enable(STDERR)  # also when systemd's watchdog sends SIGABRT
    sys.setswitchinterval(config.server.switch_interval_s)
    boss = supervisor()
    notifier = Notifier(boss.address)
    watchdog = Watchdog(config.server.stuck_after_s, notifier, boss.watchdog_s)
    listener = _bind(config)
    signals = Signals()
    startup = Startup(time.monotonic)
    front = Front(Starting(startup, model_name(config)))
    http = uvicorn.Server(http_config(front, config))
    tasks = [asyncio.create_task(watchdog.run()), asyncio.create_task(http._serve([listener]))]
    try:
        daemon = await _built(config, disk, startup, signals)
    except BaseException:
        http.should_exit = True
        await tasks[1]
        tasks[0].cancel()
        raise
    service = service_of(daemon, warnings)
    engine = asyncio.create_task(daemon.engine.run())
    watchdog.watch(daemon.engine)
    status = asyncio.create_task(service.status.run())
    batches = asyncio.create_task(run_batches(service))
    tasks += [
        asyncio.create_task(_probe_lag(daemon.metrics)),
        asyncio.create_task(_probe_files(daemon)),
        asyncio.create_task(_reload_when(signals.reload, daemon, again or (lambda: config))),
    ]
    front.app = create_app(service)
    _announce(daemon, listener)
    notifier.ready(f"ready: {daemon.summary}")
    stopping = asyncio.create_task(signals.stop.wait())
    await asyncio.wait({engine, stopping, tasks[1]}, return_when=asyncio.FIRST_COMPLETED)
    batches.cancel()  # what they were at goes on at the next start, and keeps nobody waiting now
    await asyncio.gather(batches, return_exceptions=True)
    ending = _Ending(daemon, notifier, signals)
    await daemon.engine.drain(config.server.shutdown_timeout_s)
    status.cancel()  # who watches saw the drain, and would keep the server open
    http.should_exit = True
    await tasks[1]
    for task in (*tasks, stopping):
        task.cancel()
    await daemon.aclose()
    with suppress(Exception):  # logged by the engine already
        await engine
    ending.over()
    log.info("stopped")
    return 0 if daemon.engine.state == "stopped" else 1


class Signals:
    """What the process was asked for: `stop` by the first SIGTERM or SIGINT, `abort` by the second, `reload` by SIGHUP.
    The third stop ends the process where it stands."""

    def __init__(self) -> None:
        self.stop, self.abort, self.reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)

    def _stop(self) -> None:
        if self.abort.is_set():
            leave("a third signal")
        (self.abort if self.stop.is_set() else self.stop).set()


class _Ending:
    """The end has a deadline: the drain's time and the flush's, or a few seconds after a second signal."""

    def __init__(self, daemon: Daemon, notifier: Notifier, signals: Signals) -> None:
        config = daemon.config
        self._daemon = daemon
        self._loop = asyncio.get_running_loop()
        drain_s = config.server.shutdown_timeout_s
        all_s = drain_s + config.kv.drain_flush_s + END_MARGIN_S
        log.info("stopping: no new requests, running ones get %g s", drain_s)
        notifier.stopping(all_s, f"draining for at most {drain_s:g} s")
        self._timer = self._loop.call_later(all_s, self._give_up)
        self._aborting = asyncio.create_task(self._abort_when(signals.abort))

    async def _abort_when(self, asked: asyncio.Event) -> None:
        await asked.wait()
        log.warning("stopping now: what runs is aborted")
        self._timer.cancel()
        self._timer = self._loop.call_later(ABORT_S, self._give_up)
        self._daemon.engine.hurry()

    def _give_up(self) -> None:
        log.error("the end takes too long; %s", json.dumps(describe(self._daemon.engine)))
        dump_stacks()
        leave("the end takes too long")

    def over(self) -> None:
        self._timer.cancel()
        self._aborting.cancel()


def leave(why: str, code: int = 1) -> NoReturn:
    """End the process here and now, whatever its threads are at."""
    log.warning("leaving: %s", why)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


async def _built(config: Config, disk: OsIo | None, startup: Startup, signals: Signals) -> Daemon:
    """The daemon, opened. Made in a thread, so that probes are answered meanwhile; asked to stop, it is left behind."""
    building = asyncio.create_task(_build(config, disk, startup))
    stopping = asyncio.create_task(signals.stop.wait())
    await asyncio.wait({building, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not building.done():
        leave("asked to stop while starting", 0)
    stopping.cancel()
    return building.result()


async def _build(config: Config, disk: OsIo | None, startup: Startup) -> Daemon:
    daemon = await asyncio.to_thread(build, config, disk, startup)
    await daemon.open()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    return daemon


def http_config(app: ASGIApp, config: Config) -> uvicorn.Config:
    """How uvicorn serves `app` within the limits of `config`."""
    limits = config.server
    doors = Doors(may_connect(limits.max_connections), limits.max_header_bytes, limits.header_timeout_s)
    return uvicorn.Config(
        app, http=doors.protocol(), ws="none", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=65, lifespan="off",
    )  # fmt: skip


async def _reload_when(asked: asyncio.Event, daemon: Daemon, again: Callable[[], Config]) -> None:
    while True:
        await asked.wait()
        asked.clear()
        await daemon.reload(again)
        set_level(daemon.config.server.log_level)


async def run_batches(service: Service) -> None:
    """Runs what is in the vault until cancelled; nothing where there is none."""
    if service.vault is not None:
        try:
            await Runner(service.vault, InProcess(service)).run()
        except Exception:
            log.exception("batches stand still until the next start")
            raise


def _bind(config: Config) -> socket.socket:
    """Take the port before the slow part of the start, so that a wrong one is known at once."""
    host, port = config.server.host, config.server.port
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; {_free_port(host, port)}", param="server.port"
        ) from error
    return listener


def _free_port(host: str, taken: int) -> str:
    """The nearest one that could be had."""
    first = max(PORTS_OF_ALL, taken + 1)
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, suppress(OSError):
            probe.bind((host, port))
            return f"--port {port} is free"
    return "choose another --port, or another --host"


def _announce(daemon: Daemon, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("%s", daemon.summary)
    log.info("%s", daemon.dialect.summary)
    page = f", live page: {url}/ui" if daemon.config.server.ui else ""
    log.info("ready at %s (API: %s/v1, metrics: %s/metrics%s)", url, url, url, page)
    body = json.dumps({"model": daemon.model_name, "prompt": "Once upon a time", "max_tokens": 16})
    if daemon.model_name == "demo":
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": _demo_question()}]})
    route = "chat/completions" if daemon.model_name == "demo" else "completions"
    print(f"\ntry it:\n  curl -s {url}/v1/{route} -H 'Content-Type: application/json' -d '{body}'\n", flush=True)


def _demo_question() -> str:
    return "Mira keeps coins in Lisbon. Tom plays chess. Anna speaks Danish. Where does Mira keep coins?"


async def _probe_lag(metrics: Metrics) -> None:
    """How late the event loop runs what it was asked to run."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(LAG_PROBE_S)
        metrics.loop_lag(time.monotonic() - before - LAG_PROBE_S)


async def _probe_files(daemon: Daemon) -> None:
    """Says once when the model's files are not what was loaded. Nothing goes wrong by that: what is served, and the
    identity of its blocks, are of what was read, and the next start takes the identity of what is there then."""
    while True:
        changed = await asyncio.to_thread(daemon.changed_files)
        if changed:
            log.warning(
                "the files of the model changed (%s): what was loaded is served on; a restart serves what is there "
                "then, and uses nothing that was cached of the old weights",
                ", ".join(changed[:4]) + (", ..." if len(changed) > 4 else ""),
            )
            return
        await asyncio.sleep(FILES_PROBE_S)
