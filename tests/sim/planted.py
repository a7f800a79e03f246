"""Bugs to plant: each is one line of production code as somebody might get it wrong.

A bug names a function, the text in it that is right and the text that is wrong; `plant` compiles the wrong one in its
place. When the code changes so that the text is gone, planting fails and says so: then write the bug anew.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Bug:
    name: str
    where: str
    """`module:function` or `module:Class.method`, below `server.`"""
    right: str
    """As it stands in the function when that is moved to the left margin; replaced wherever it occurs."""
    wrong: str
    nets: tuple[str, ...]
    """What must catch it."""


SIM, KV, STEPS = "simulation", "kv machine", "scheduler machine"
MANAGER, SCHEDULER = "kvcache.manager:KVManager", "scheduler.scheduler:Scheduler"

BUGS = [
    # --- frames and leases
    Bug(
        "a leased frame may be evicted",
        f"{MANAGER}._may_go",
        "(tier is self.device and block.leases)",
        "False",
        (
            SIM,
            KV,
            STEPS,
        ),
    ),
    Bug(
        "a frame that a transfer reads may be evicted",
        f"{MANAGER}._may_go",
        "copy.readers or ",
        "",
        (
            SIM,
            KV,
        ),
    ),
    Bug(
        "a parent may go before its child",
        f"{MANAGER}._may_go",
        "copy.pins or ",
        "",
        (SIM,),
    ),
    Bug(
        "a chain is refreshed parent first",
        f"{MANAGER}._refresh",
        "in reversed(blocks)",
        "in blocks",
        (
            SIM,
            KV,
            STEPS,
        ),
    ),
    Bug(
        "a block table gets its frames twice",
        f"{MANAGER}.grow",
        "lease.table.extend(frames)",
        "lease.table.extend(frames + frames)",
        (
            SIM,
            KV,
            STEPS,
        ),
    ),
    Bug(
        "a truncated block keeps its lease",
        f"{MANAGER}._truncate",
        "self._let_go(dropped, now)",
        "pass",
        (SIM,),
    ),
    # --- sealing and identity
    Bug(
        "a block is sealed before its last token is computed",
        f"{SCHEDULER}._seal",
        "request.computed_tokens //",
        "(request.computed_tokens + 1) //",
        (
            SIM,
            STEPS,
        ),
    ),
    Bug(
        "the hash leaves the salt out",
        f"{MANAGER}.root",
        ", cache_salt)",
        ', "")',
        (
            SIM,
            KV,
        ),
    ),
    Bug(
        "the hash leaves the parent out",
        "kvcache.hashing:block_hash",
        "parent + tokens",
        "tokens",
        (
            SIM,
            KV,
        ),
    ),
    Bug(
        "the table keeps the frame of a block that was given up",
        f"{MANAGER}._adopt",
        "lease.table.replace(position, theirs.frame)",
        "pass",
        (
            SIM,
            KV,
            STEPS,
        ),
    ),
    Bug(
        "an adopted block is not held",
        f"{MANAGER}._adopt",
        "self._hold(twin)\n        self.device.pool",
        "self.device.pool",
        (
            SIM,
            KV,
            STEPS,
        ),
    ),
    # --- transfers
    Bug(
        "a failed transfer counts as landed",
        f"{MANAGER}.complete",
        "if fault is None:",
        "if True:",
        (
            SIM,
            KV,
        ),
    ),
    Bug(
        "a spill is readable before it landed",
        f"{MANAGER}._spill",
        "ready=False",
        "ready=True",
        (
            SIM,
            KV,
        ),
    ),
    Bug(
        "a block that somebody else sent for again is trusted",
        f"{MANAGER}._settle",
        "copy is None or not copy.ready",
        "copy is None",
        (SIM,),
    ),
    Bug(
        "a lease waits for the first of its blocks only",
        f"{MANAGER}._onboard",
        "lease.onboarding += 1",
        "lease.onboarding = 1",
        (SIM,),
    ),
    Bug(
        "a landing wakes nobody",
        "engine:Engine._landed",
        "self._wake.set()",
        "pass",
        (SIM,),
    ),
    # --- the step
    Bug(
        "an abort frees frames under a running step",
        f"{SCHEDULER}.abort",
        "id not in self._planned_ids",
        "True",
        (SIM,),
    ),
    Bug(
        "a resumed request skips a token",
        f"{SCHEDULER}._run",
        "request.computed_tokens = hit * self._block_tokens",
        "request.computed_tokens = hit * self._block_tokens + bool(request.preemptions)",
        (SIM,),
    ),
    Bug(
        "a full match leaves no token to sample from",
        f"{SCHEDULER}._usable_hashes",
        "(len(request.tokens) - 1)",
        "len(request.tokens)",
        (
            SIM,
            STEPS,
        ),
    ),
    Bug(
        "after a preemption the sampler's position is off",
        f"{SCHEDULER}._row",
        "SampleSpec(request.params, end,",
        "SampleSpec(request.params, end + bool(request.preemptions),",
        (
            SIM,
            STEPS,
        ),
    ),
    Bug(
        "a preempted request keeps half its prompt scores",
        f"{SCHEDULER}._preempt",
        "request.prompt_logprobs = []",
        "pass",
        (SIM,),
    ),
    Bug(
        "prompt scores take cached blocks",
        f"{SCHEDULER}._usable_hashes",
        "0 if request.scores_prompt else ",
        "",
        (
            SIM,
            STEPS,
        ),
    ),
    Bug(
        "the row of a preempted request stays in the step",
        f"{SCHEDULER}._advance",
        "draft.drop(victim.id)",
        "pass",
        (SIM,),
    ),
    Bug(
        "a row costs one token of the budget, however long",
        "scheduler.scheduler:_Draft.add",
        "self.budget -= len(row.tokens)",
        "self.budget -= 1",
        (SIM,),
    ),
    Bug(
        "prompts go before decodes",
        f"{SCHEDULER}._draft",
        "(True, False)",
        "(False, True)",
        (SIM,),
    ),
    Bug(
        "a prefix is awaited that nobody computes any more",
        f"{SCHEDULER}._retire",
        "self._unclaim(request, request.claimed)",
        "pass",
        (
            SIM,
            STEPS,
        ),
    ),
    Bug(
        "a failed step forgets those that left meanwhile",
        f"{SCHEDULER}.fail",
        "        self._finish(request, now)",
        "            self._finish(request, now)",
        (STEPS,),
    ),
    Bug(
        "the device is not told that a request has left",
        f"{SCHEDULER}._retire",
        "self._retired.append(request.id)",
        "pass",
        (SIM,),
    ),
]


def plant(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `bug` in place until the test ends."""
    module_name, _, path = bug.where.partition(":")
    module = importlib.import_module(f"server.{module_name}")
    *owners, name = path.split(".")
    owner: Any = module
    for step in owners:
        owner = getattr(owner, step)
    source = textwrap.dedent(inspect.getsource(inspect.getattr_static(owner, name)))
    assert bug.right in source, f"{bug.where} does not read {bug.right!r} any more: write this planted bug anew"
    source = "from __future__ import annotations\n" + source.replace(bug.right, bug.wrong)
    scope: dict[str, Any] = {}
    exec(compile(source, bug.where, "exec"), vars(module), scope)
    monkeypatch.setattr(owner, name, scope[name])
