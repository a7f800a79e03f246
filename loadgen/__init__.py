"""Load generation and measurement of a running server; see README.md for what it will hold."""
