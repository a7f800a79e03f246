"""The HTTP surface: OpenAI-compatible routes, probes and metrics over one engine.

It knows HTTP, JSON and text; it refuses to know blocks, steps and tiers. Everything runs on the loop thread but the
encoding of long texts, which has a small pool of its own.
"""
