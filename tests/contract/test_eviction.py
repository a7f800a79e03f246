"""What every eviction policy must do, whoever wrote it: parametrised over the table it is listed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ConfigError
from server.kvcache import audit
from server.kvcache.block import Block, Lease
from server.kvcache.eviction import POLICIES, EvictionPolicy, make_policy
from server.kvcache.manager import KVManager
from tests.property.core import cached_blocks, come, land, make_kv, visit

every_policy = pytest.mark.parametrize("name", sorted(POLICIES))
SEQUENCES = [(0,) * 12, (0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), (0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2)]
histories = st.lists(st.tuples(st.sampled_from(SEQUENCES), st.integers(1, 12), st.booleans()), max_size=40)


def chain(length: int) -> list[Block]:
    """Sealed blocks, each the parent of the next."""
    blocks: list[Block] = []
    for number in range(length):
        blocks.append(Block(bytes([number]), blocks[-1] if blocks else None))
    return blocks


def let_go(policy: EvictionPolicy, blocks: list[Block]) -> None:
    """As a lease does when it ends: the child before its parent."""
    for block in reversed(blocks):
        policy.on_insert(block, 0.0)


def replay(kv: KVManager, history: list[tuple[tuple[int, ...], int, bool]]) -> None:
    """Requests come and go; some stay until the device has no room for the next. The audit looks on."""
    staying: list[Lease] = []
    for now, (sequence, length, stays) in enumerate(history):
        while staying and kv.available_blocks < kv.layout.blocks_for(length):
            kv.release(staying.pop(0), now)
            audit.check(kv)
        staying.append(come(kv, sequence[:length], now=now))
        audit.check(kv)
        if not stays:
            kv.release(staying.pop(), now)
        land(kv, now=now)
        audit.check(kv)
    for lease in staying:
        kv.release(lease, len(history))
    audit.check(kv)


@every_policy
def test_knows_exactly_what_was_inserted(name: str):
    """It yields every block that was inserted and not removed, each once, and its length is their number."""
    policy, blocks = make_policy(name), chain(6)
    let_go(policy, blocks)
    assert sorted(block.hash or b"" for block in policy.victims()) == [bytes([number]) for number in range(6)]
    for left, block in enumerate(blocks):
        assert len(policy) == 6 - left
        policy.on_remove(block)
        assert block not in list(policy.victims())
    assert len(policy) == 0
    assert list(policy.victims()) == []


@every_policy
def test_yields_a_child_before_its_parent(name: str):
    """A chain that was let go leaves from its end."""
    policy, blocks = make_policy(name), chain(5)
    let_go(policy, blocks)
    assert list(policy.victims()) == list(reversed(blocks))


@every_policy
def test_asking_for_victims_changes_nothing(name: str):
    """`victims` may be called and given up half-way as often as one likes."""
    policy = make_policy(name)
    let_go(policy, chain(5))
    next(iter(policy.victims()))
    assert list(policy.victims()) == list(policy.victims())
    assert len(policy) == 5


@every_policy
def test_a_removed_block_may_come_back(name: str):
    """A block that was in use and is let go again is evictable again, once."""
    policy, blocks = make_policy(name), chain(3)
    let_go(policy, blocks)
    for block in blocks:
        policy.on_remove(block)
        block.hits += 1
    let_go(policy, blocks)
    assert len(policy) == 3
    assert list(policy.victims()) == list(reversed(blocks))


@every_policy
@given(history=histories, block_tokens=st.integers(1, 3))
def test_suffix_first_over_any_history(name: str, history: list[tuple[tuple[int, ...], int, bool]], block_tokens: int):
    """On one tier, whatever came and went, it ranks exactly what may go and no parent before its resident child."""
    replay(make_kv(12, block_tokens=block_tokens, eviction=name), history)


@every_policy
@given(history=histories, lower=st.integers(1, 8))
def test_suffix_first_on_both_of_two_tiers(name: str, history: list[tuple[tuple[int, ...], int, bool]], lower: int):
    """With a tier below, blocks that spill and come up again keep that order in both."""
    replay(make_kv(12, lower, block_tokens=1, eviction=name), history)


@every_policy
def test_the_least_recently_used_of_equals_goes_first(name: str):
    """Of chains that were each used once, the oldest makes room."""
    kv = make_kv(6, eviction=name)
    for now, token in enumerate((1, 2, 3)):
        visit(kv, [token] * 4, now=now)
    visit(kv, [4] * 4, now=3)
    assert [cached_blocks(kv, [token] * 4) for token in (1, 2, 3, 4)] == [0, 2, 2, 2]


def test_slru_keeps_what_was_found_again():
    """Prompts that nobody asks for again flush the prefix that everybody shares out of a plain LRU, and not here."""
    for name, kept in (("lru", 0), ("slru", 2)):
        kv = make_kv(10, eviction=name)
        shared = [1] * 4
        visit(kv, list(range(50, 58)))
        visit(kv, [*shared, 2])
        visit(kv, [*shared, 3])
        visit(kv, list(range(10, 22)))
        visit(kv, list(range(30, 42)))
        assert cached_blocks(kv, shared) == kept


def test_an_unknown_policy_is_named_with_those_there_are():
    """A typing error in the configuration gets an answer that helps."""
    with pytest.raises(ConfigError, match=r"unknown eviction 'lur'; did you mean 'lru'\?"):
        make_policy("lur")
