"""What the commands say, and where: one console, the loggers, the first process alone."""

import logging
import sys
import warnings

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

# Without markup: names, paths and answers of a model hold brackets that mean nothing to us. Where a style is meant, the
# call says markup=True, and escapes what is not ours.
console = Console(markup=False)


def set_up_logging(*, to_stderr: bool = False) -> None:
    """Our messages to the terminal, once; those of the libraries only where they warn.

    Args:
        to_stderr: To standard error, for commands whose standard output is for what they made.
    """
    ours = logging.getLogger("difftune")
    if not ours.handlers:
        # Rich wraps lines to the width of the terminal; a file should keep them whole.
        told = Console(stderr=True, markup=False) if to_stderr else console
        to_terminal = RichHandler(console=told, show_path=False, show_time=False)
        plain = logging.StreamHandler(sys.stderr if to_stderr else sys.stdout)
        ours.addHandler(to_terminal if told.is_terminal else plain)
        ours.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
        ours.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Batches are made by the stream: workers would only copy it.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 with torch 2.13; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # PEFT with transformers 5.23, for an adapter on a model that computes its blocks again.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*", category=FutureWarning)
    # How torch exchanges shards of two dimensions; nothing that a user could change either.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and writes."""
    # Lightning sets it when it is imported, from the environment of the launcher.
    return getattr(rank_zero_only, "rank", 0) == 0


def say(text: str, heading: str = "") -> None:
    """A line on the terminal, from the first process alone; a heading stands before it in bold."""
    if is_first_rank():
        if heading:
            console.print(heading, style="bold", end="", highlight=False, soft_wrap=True)
        console.print(text, highlight=False, soft_wrap=True)
