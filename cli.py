"""Launcher for torchrun and slurm: `torchrun --nproc-per-node 8 cli.py fit ...` is `difftune fit ...` on 8 devices."""

import sys

from difftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
