"""`python -m onepass`: the command line; its commands are in onepass/_cli."""

import sys

from ._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
