"""What the daemon says of itself while it runs: the live page's numbers, once a second; see README.md."""
