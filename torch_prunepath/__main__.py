"""``python -m torch_prunepath``: the command ``prunepath``."""

import sys

from torch_prunepath.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
