"""The requests that are being answered, as far as who looks may see them: numbers, never text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from heapq import nsmallest
from typing import Any, Literal, Protocol

from server.api.status.warnings import WarningLog

SHOWN_REQUESTS = 50
ID_CHARS = 12


class LiveRequest(Protocol):
    """One HTTP request, or one line of a batch, from its admission to its end. `started_s`: Unix time."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def started_s(self) -> float: ...
    @property
    def background(self) -> bool: ...
    @property
    def phase(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def cached_by_tier(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks: an admin sees every request and the log's warnings; a tenant sees its own requests; others none."""

    sees: Literal["all", "own", "none"]
    tenant: str = ""


def live_view(
    requests: Collection[LiveRequest],
    viewer: Viewer,
    warnings: WarningLog,
    name_of: Callable[[str], str],
    now_s: float,
) -> dict[str, Any]:
    """What `viewer` sees. The oldest SHOWN_REQUESTS requests; `count` is of all that it may see. `name_of` a tenant."""
    seen = [request for request in requests if viewer.sees == "all" or request.tenant == viewer.tenant]
    if viewer.sees == "none":
        seen = []
    admin = viewer.sees == "all"
    rows = []
    for request in nsmallest(SHOWN_REQUESTS, seen, key=lambda request: (request.started_s, request.id)):
        row = {
            "id": request.id[:ID_CHARS],
            "phase": request.phase,
            "background": request.background,
            "prompt_tokens": request.prompt_tokens,
            "generated_tokens": request.generated_tokens,
            "cached_tokens_by_tier": dict(request.cached_by_tier),
            "age_s": round(max(0.0, now_s - request.started_s), 1),
        }
        rows.append(row | ({"tenant": name_of(request.tenant)} if admin else {}))
    warned = [asdict(entry) for entry in warnings.newest()] if admin else None
    return {"sees": viewer.sees, "count": len(seen), "requests": rows, "warnings": warned}
