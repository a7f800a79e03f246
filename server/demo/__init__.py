"""The demo model: a tiny language model that does nothing but recall facts from a long context."""
