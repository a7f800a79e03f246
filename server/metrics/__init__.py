"""What the daemon counts and how Prometheus sees it; see README.md for every family."""

from server.metrics.recording import MAX_HTTP_CHILDREN, Metrics, lengths_up_to

__all__ = ["MAX_HTTP_CHILDREN", "Metrics", "lengths_up_to"]
