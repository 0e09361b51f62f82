"""``python -m estargz``: the command line."""

import sys

from estargz.cli import main

if __name__ == "__main__":
    sys.exit(main())
