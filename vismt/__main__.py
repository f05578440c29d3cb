"""Run the command line: `python -m vismt`."""

import sys

from vismt.cli import main

if __name__ == "__main__":
    sys.exit(main())
