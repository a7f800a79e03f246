"""What the cache brought and what it cost, by tier: seconds of computing that hits spared, seconds that requests were
held up by loads. Loop thread only, no clock.

What was spared is an estimate: what the tokens would have added to a step, by the line through measured steps. What it
cost is measured: the time in which a request could compute nothing because the next block was on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.kvcache.block import Lease
from server.kvcache.books import TierBooks
from server.kvcache.lives import sampled
from server.kvcache.step_cost import StepCost
from server.types import DEVICE, BlockHash


class Accounts:
    def __init__(self, levels: Sequence[TierBooks], step: StepCost, block_tokens: int) -> None:
        self._levels = levels
        self._lives = {books.name: books.lives.life for books in levels}
        self._step = step
        self._block_tokens = block_tokens

    def asked(self, hashes: Sequence[BlockHash], now: float) -> None:
        """A request arrived that could use these blocks."""
        for value in sampled(hashes):
            for books in self._levels:
                frame = books.find.get(value)
                if frame is not None:
                    books.lives.asked_again(books.used_s[frame], now)
                    break
                books.lives.asked_in_vain(value, now)

    def credit(self, lease: Lease) -> None:
        """What `lease` gained since the last call is used."""
        size = self._block_tokens
        for tier, position, count in lease.gained:
            self._lives[tier].avoided_s += self._step.tokens_s(position * size, count * size)
        lease.gained.clear()

    def held_up(self, lease: Lease, seconds: float) -> None:
        """Whoever has `lease` could do nothing for so long but wait for the block that it waits for."""
        self._lives[lease.waits_for].held_up_s += seconds

    def restored(self, lease: Lease, now: float) -> None:
        """All blocks that were sent for are in the table."""
        for books in reversed(self._levels):
            if books.name != DEVICE and lease.served[books.name]:
                books.lives.life.restore_s.observe((lease.landed_s or now) - lease.since_s)
                return
