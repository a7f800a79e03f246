"""Benchmarks of the daemon's own claims: scheduler host time, model speed, many clients. See README.md."""
