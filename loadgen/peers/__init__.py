"""Other CPU servers beside this one: installing, starting and measuring them."""
