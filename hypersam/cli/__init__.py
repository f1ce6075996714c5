"""The ``hypersam`` command."""

from hypersam.cli.main import main

__all__ = ["main"]
