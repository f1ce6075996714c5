"""``python -m hypersam.cli``: the same as the ``hypersam`` command."""

from hypersam.cli.main import main

main()
