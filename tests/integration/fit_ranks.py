"""The command line on several ranks, as torchrun starts it; a worker of `ranks.py`."""

import json
import sys

from difftune import cli
from difftune.commands import run  # noqa: F401 - the imports of a run, paid once for all ranks


def main(arguments):
    """``JOBS``, a JSON list of argument lists: run ``difftune`` with each in turn; end with the first code but 0."""
    for job in json.loads(arguments[0]):
        code = cli.main(job)
        if code:
            sys.exit(code)
