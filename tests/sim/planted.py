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
BOOKS, TRAFFIC = "kvcache.books:TierBooks", "kvcache.traffic:Traffic"

BUGS = [
    # --- frames and holds
    Bug("a held frame may be evicted", f"{BOOKS}.may_go", "or self.holds[frame] ", "", (SIM, KV, STEPS)),
    Bug("a parent may go before its child", f"{BOOKS}.may_go", " or self.pins[frame]", "", (SIM, KV)),
    Bug(
        "a chain is refreshed parent first",
        f"{BOOKS}.refresh",
        "in reversed(list(enumerate(values)))",
        "in enumerate(values)",
        (SIM, KV, STEPS),
    ),
    Bug("a failed block stays filed", f"{BOOKS}.unhold", "and not self.ready[frame]", "and False", (SIM, KV)),
    Bug("a parent keeps its rank when a child comes", f"{BOOKS}.hang", "self._unrank(above)", "pass", (SIM,)),
    Bug("a pinned block may go", f"{BOOKS}.may_go", "value not in self.kept", "True", (KV,)),
    Bug(
        "a block table gets its frames twice",
        f"{MANAGER}.grow",
        "lease.table.extend(frames)",
        "lease.table.extend(frames + frames)",
        (SIM, KV, STEPS),
    ),
    # --- sealing and identity
    Bug(
        "a block is sealed before its last token is computed",
        f"{SCHEDULER}._seal",
        "request.computed_tokens //",
        "(request.computed_tokens + 1) //",
        (SIM, STEPS),
    ),
    Bug("the hash leaves the salt out", f"{MANAGER}.root", ", cache_salt)", ', "")', (SIM, KV)),
    Bug("the hash leaves the parent out", "kvcache.hashing:block_hash", "parent + tokens", "tokens", (SIM, KV)),
    Bug(
        "the table keeps the frame of a block that was given up",
        f"{MANAGER}.seal",
        "lease.table.replace(position, twin)",
        "pass",
        (SIM, KV, STEPS),
    ),
    Bug("an adopted block is not held", f"{MANAGER}.seal", "device.hold(twin)", "pass", (SIM, KV, STEPS)),
    # --- loads
    Bug("a failed load counts as landed", f"{TRAFFIC}._came_up", "if fault is None:", "if True:", (SIM, KV)),
    Bug("a bad copy is trusted again", f"{TRAFFIC}._came_up", 'fault.reason == "corrupt"', "False", (KV,)),
    Bug(
        "a load delivers a frame that it does not hold",
        f"{TRAFFIC}._deliver",
        "device.hold(frame)",
        "pass",
        (SIM, KV, STEPS),
    ),
    Bug("who leaves a load is still served", f"{TRAFFIC}.leave", "load.leases.remove(lease)", "pass", (SIM, KV, STEPS)),
    Bug(
        "a load over its deadline is waited for",
        f"{TRAFFIC}._expire",
        "load.leases.clear()",
        "pass",
        (KV,),
    ),
    Bug(
        "a load that failed is never given up",
        f"{TRAFFIC}._end",
        "        del lease.loads[load.depth]",
        "        pass",
        (SIM, KV, STEPS),
    ),
    Bug(
        "blocks that came are not let go of",
        f"{MANAGER}.release",
        "device.unhold(lease.tail[position][0])",
        "pass",
        (SIM, KV),
    ),
    Bug(
        "the table takes blocks out of order",
        f"{MANAGER}.join",
        "lease.tail.pop(position, None)",
        "lease.tail.pop(max(lease.tail, default=0), None)",
        (SIM,),
    ),
    Bug("nobody looks again when a load is late", f"{MANAGER}.compute_until", "self.wake_s = min", "_ = min", (STEPS,)),
    # --- spills
    Bug("a spill is readable before it landed", f"{TRAFFIC}._spill_to", "ready=False", "ready=True", (SIM, KV)),
    Bug("a spill does not hold its source", f"{TRAFFIC}._spill_to", "source.hold(origin)", "pass", (SIM, KV)),
    Bug("a failed spill counts as landed", f"{TRAFFIC}._went_down", "if fault is None:", "if True:", (SIM, KV)),
    Bug(
        "room for a child is made by its parent",
        f"{TRAFFIC}._plan_down",
        "below.hold(anchor)",
        "pass",
        (KV,),
    ),
    Bug("a landing wakes nobody", "engine:Engine._landed", "self._wake.set()", "pass", (SIM,)),
    # --- restart
    Bug("a restart hands out frames in use", f"{BOOKS}.recover", "self.pool.occupy(frames)", "pass", (SIM,)),
    # --- the step
    Bug(
        "an abort frees frames under a running step",
        f"{SCHEDULER}.abort",
        "id not in self._planned_ids and id not in self._ahead_ids",
        "True",
        (SIM,),
    ),
    Bug(
        "who is over frees frames under the step that follows",
        f"{SCHEDULER}._end",
        "if request.id not in self._planned_ids:",
        "if request.id in self.requests:",
        (SIM, STEPS),
    ),
    Bug(
        "a block that a step reads is exchanged for its twin",
        f"{SCHEDULER}._seal",
        "in_step=request.id in self._planned_ids",
        "in_step=False",
        (SIM,),
    ),
    Bug(
        "a step is followed although somebody has sampled the last token",
        "scheduler.feeding:rows_ahead",
        "request.generated + 1 >= request.params.max_tokens",
        "request.generated >= request.params.max_tokens",
        (STEPS,),
    ),
    Bug(
        "what was aborted is sealed beyond the tokens that are known",
        f"{SCHEDULER}.commit",
        "min(row.start + len(row.tokens), len(request.tokens))",
        "row.start + len(row.tokens)",
        (SIM,),
    ),
    Bug(
        "a row that follows has no room of its own",
        "scheduler.feeding:rows_ahead",
        "not kv.grow(lease, start + 1)",
        "False",
        (SIM, STEPS),
    ),
    Bug(
        "a resumed request skips a token",
        f"{SCHEDULER}._joined",
        "len(lease.table) * self._block_tokens",
        "len(lease.table) * self._block_tokens + bool(request.preemptions)",
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
        "scheduler.feeding:row_of",
        "SampleSpec(params, end,",
        "SampleSpec(params, end + bool(request.preemptions),",
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
        "0 if request.needs_all_states else ",
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
        "scheduler.draft:Draft._count",
        "self.budget -= sign * count",
        "self.budget -= sign",
        (SIM,),
    ),
    Bug(
        "prompts go before decodes",
        f"{SCHEDULER}._serve",
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
        "        self._end(request, now)",
        "            self._end(request, now)",
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
