"""Media of the KV cache: one file each, behind the `Tier` seam of `base.py`. Adding one is a file and a line here."""

from __future__ import annotations

TIERS = {
    "device": "server.kvcache.tiers.device:DeviceTier",
    "cuda": "server.kvcache.tiers.cuda:CudaTier",
    "ssd": "server.kvcache.tiers.ssd:SsdTier",
}
"""Tier name -> its class, resolved when needed: a machine without an SSD directory never imports that tier."""
