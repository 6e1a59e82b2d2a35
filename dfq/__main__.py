"""``python -m dfq``: the same as the ``dfq`` command."""

import sys

from dfq.cli import main

if __name__ == "__main__":
    sys.exit(main())
