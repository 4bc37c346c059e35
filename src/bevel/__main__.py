"""`python -m bevel` is the command `bevel`."""

import sys

from bevel.cli import main

if __name__ == "__main__":
    sys.exit(main())
