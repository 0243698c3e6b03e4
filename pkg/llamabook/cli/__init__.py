"""The command line, written by hand: `python -m llamabook` and the console script `llamabook`."""

from llamabook.cli.app import main

__all__ = ["main"]
