"""What only a GPU can show: ceilings, attention, steps of an 8B model, tiers, serving. See ../README.md."""
