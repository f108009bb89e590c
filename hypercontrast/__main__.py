"""`python -m hypercontrast COMMAND`, where the command `hypercontrast` is not installed."""

import sys

from hypercontrast.cli import main

if __name__ == "__main__":
    sys.exit(main())
