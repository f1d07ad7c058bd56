"""What all processes of a run have to say alike, the first one says alone."""

import os
from datetime import timedelta

_PATIENCE = timedelta(seconds=5)


def is_told_by_first(error: BaseException) -> bool:
    """Whether the first process of this run ends with the same error, so that this one need not print it.

    Processes of torchrun find one another through its store, before the training connects them and after. Elsewhere,
    where the first process is still silent after five seconds, or where it cannot be asked, the answer is no: an error
    that only one process has is never lost.

    Args:
        error: What ends this process. The first one leaves it for the others to compare.
    """
    variables = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or any(name not in os.environ for name in variables):
        return False
    # A command line that is wrong is found before torch is needed.
    from torch.distributed import TCPStore

    rank, address, port = (os.environ[name] for name in variables)
    key = f"difftune/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    text = f"{type(error).__name__}: {error}"
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=_PATIENCE)
        if rank == "0":
            store.set(key, text)
            return False
        return bool(store.get(key) == text.encode())
    except RuntimeError:
        # What torch raises when nobody answers in time.
        return False
