"""Content addresses of blocks. Knows bytes and tokens; refuses to know models, tiers and requests.

A block's hash covers every token before it and everything that decides what its KV bytes are: the chain's root is keyed
by the fingerprint (weights, effective config, layout, dtype, block size) and by the tenant's cache salt. blake2b with
32 bytes: collisions are out of reach for an attacker too, and one 16-token block costs about 1 us.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from server.types import BlockHash

HASH_BYTES = 32
_ROOT = b"terrace-root-v1"


def chain_root(fingerprint: bytes, cache_salt: str) -> BlockHash:
    """The parent of every first block of one tenant under one fingerprint (at most 64 bytes of it are used as key)."""
    return blake2b(cache_salt.encode(), key=fingerprint[:64], person=_ROOT, digest_size=HASH_BYTES).digest()


def block_hash(parent: BlockHash, tokens: bytes) -> BlockHash:
    """Hash of one full block; `tokens` are its int32 token ids in native byte order."""
    return blake2b(parent + tokens, digest_size=HASH_BYTES).digest()


def extend_hashes(hashes: list[BlockHash], root: BlockHash, tokens: array[int], block_tokens: int) -> None:
    """Append the hashes of the full blocks of `tokens` that `hashes` does not cover yet."""
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        parent = block_hash(parent, tokens[start : start + block_tokens].tobytes())
        hashes.append(parent)
