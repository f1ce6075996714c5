"""One module a family: its configuration, its network, and its own rules before and after it."""
