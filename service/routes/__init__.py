"""One module a group of routes; each offers a `router`."""
