"""`terrace serve`: the daemon as a process, from binding its port to the exit code. Loop thread."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from server.api.app import create_app
from server.api.connections import Doors, may_connect
from server.api.inprocess import InProcess
from server.api.service import Service
from server.api.status.warnings import LOGGER, WarningLog
from server.batches.runner import Runner
from server.build import Daemon, build, service_of
from server.config import Config
from server.errors import ConfigError
from server.kvcache.tiers.files import OsIo
from server.metrics import Metrics

log = logging.getLogger("terrace")

LAG_PROBE_S = 0.1
GC_THRESHOLDS = (50_000, 20, 20)
"""A step of 256 rows makes about 1,000 objects that live for one step: with the default of 700 the collector would run
in every one of them, and a full collection over a large cache takes longer than a step."""


async def serve(config: Config, disk: OsIo | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; the exit code: 0 after a clean drain, 1 when the engine failed. `disk` as
    in `build`."""
    warnings = configure_logging(config)
    sys.setswitchinterval(config.server.switch_interval_s)
    listener = _bind(config)
    reload = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)  # from now on it ends nothing
    daemon = build(config, disk)
    await daemon.open()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    service = service_of(daemon, warnings)
    http = uvicorn.Server(http_config(create_app(service), config))
    engine = asyncio.create_task(daemon.engine.run())
    lag = asyncio.create_task(_probe_lag(daemon.metrics))
    status = asyncio.create_task(service.status.run())
    batches = asyncio.create_task(run_batches(service))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reloading = asyncio.create_task(_reload_when(reload, daemon))
    serving = asyncio.create_task(http._serve([listener]))
    _announce(daemon, listener)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({engine, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    batches.cancel()  # what they were at goes on at the next start, and keeps nobody waiting now
    await asyncio.gather(batches, return_exceptions=True)
    log.info("stopping: no new requests, running ones get %g s", config.server.shutdown_timeout_s)
    await daemon.engine.drain(config.server.shutdown_timeout_s)
    status.cancel()  # who watches saw the drain, and would keep the server open
    http.should_exit = True
    await serving
    for task in (lag, stopping, reloading):
        task.cancel()
    await daemon.aclose()
    with suppress(Exception):  # logged by the engine already
        await engine
    log.info("stopped")
    return 0 if daemon.engine.state == "stopped" else 1


def http_config(app: ASGIApp, config: Config) -> uvicorn.Config:
    """How uvicorn serves `app` within the limits of `config`."""
    limits = config.server
    doors = Doors(may_connect(limits.max_connections), limits.max_header_bytes, limits.header_timeout_s)
    return uvicorn.Config(
        app, http=doors.protocol(), ws="none", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=65, lifespan="off",
    )  # fmt: skip


async def _reload_when(asked: asyncio.Event, daemon: Daemon) -> None:
    while True:
        await asked.wait()
        asked.clear()
        await daemon.reload()


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
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port", param="server.port"
        ) from error
    return listener


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


class _JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(config: Config) -> WarningLog:
    """Events to stderr: readable lines on a terminal, JSON lines elsewhere. What keeps the last warnings of our own."""
    json_lines = config.server.log_format == "json" or (config.server.log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if json_lines else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=config.server.log_level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings = WarningLog()
    logging.getLogger(LOGGER).addHandler(warnings)
    return warnings
