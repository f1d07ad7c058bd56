"""`python -m difftune` is `difftune`, also where the launcher wants a module: `torchrun -m difftune fit ...`."""

import sys

from difftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
