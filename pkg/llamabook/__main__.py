"""`python -m llamabook`, written by hand: the same as the console script `llamabook`."""

import sys

from llamabook.cli import main

if __name__ == "__main__":
    sys.exit(main())
