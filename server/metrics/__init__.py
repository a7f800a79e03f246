"""What the daemon counts and how Prometheus sees it; see README.md for every family."""

from server.metrics.recording import Ending, Facts, Metrics

__all__ = ["Ending", "Facts", "Metrics"]
