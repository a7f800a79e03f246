"""When sessions arrive: gaps of an open loop, seeded. Rates are sessions per second, times seconds since the start."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from loadgen.errors import UsageError


def constant(rate: float) -> Iterator[float]:
    """Evenly spaced, the first at once."""
    count = 0
    while True:
        yield count / rate
        count += 1


def gamma(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Gamma-distributed gaps of mean 1/rate and shape `burstiness`: 1 is a Poisson process, less comes in bursts, more
    comes evenly."""
    rng = Random(f"arrivals {seed}")
    at_s = 0.0
    while True:
        yield at_s
        at_s += rng.gammavariate(burstiness, 1 / (rate * burstiness))


def ramp(start_rate: float, end_rate: float, seconds: float, seed: int) -> Iterator[float]:
    """A Poisson process whose rate goes evenly from `start_rate` to `end_rate` in `seconds`, and ends there."""
    rng = Random(f"ramp {seed}")
    passed = 0.0  # the expected number of arrivals until now; a unit Poisson process in it is ours in time
    slope = (end_rate - start_rate) / seconds
    while True:
        passed += rng.expovariate(1.0)
        if slope == 0:
            at_s = passed / start_rate
        else:  # passed = start_rate * t + slope * t^2 / 2
            inside = start_rate**2 + 2 * slope * passed
            if inside < 0:
                return
            at_s = (inside**0.5 - start_rate) / slope
        if at_s > seconds:
            return
        yield at_s


def arrivals(
    kind: str, *, rate: float, burstiness: float, ramp_to: float | None, duration_s: float | None, seed: int
) -> Iterator[float]:
    """The arrival process that the command line names: constant, poisson, gamma or ramp."""
    if rate <= 0:
        raise UsageError(f"--request-rate {rate:g}: must be above 0")
    if kind == "constant":
        return constant(rate)
    if kind == "ramp":
        if ramp_to is None or ramp_to <= 0 or duration_s is None:
            raise UsageError("--arrivals ramp needs --ramp-to, the rate at its end, and --duration, how long it takes")
        return ramp(rate, ramp_to, duration_s, seed)
    if burstiness <= 0:
        raise UsageError(f"--burstiness {burstiness:g}: must be above 0; 1 is Poisson")
    return gamma(rate, 1.0 if kind == "poisson" else burstiness, seed)
