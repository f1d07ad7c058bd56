"""The command line on several ranks, as torchrun starts it; a worker of `ranks.py`."""

import sys

from difftune import build, cli, run  # noqa: F401 - the imports of a run, paid once for all ranks


def main(arguments):
    """Run ``difftune`` with the arguments, and end with its exit code."""
    sys.exit(cli.main(arguments))
