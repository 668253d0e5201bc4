"""`python -m memcompile` is `memcompile`."""

from __future__ import annotations

import sys

from memcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
