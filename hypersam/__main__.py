"""``python -m hypersam``: the same as the ``hypersam`` command."""

from hypersam.cli import main

if __name__ == "__main__":
    main()
