"""The state of a process's random number generators, in types that load with ``weights_only=True``."""

import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """State of torch (CPU and current CUDA device), Python and numpy."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        # int64: torch cannot pickle a tensor of numpy's uint32.
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Bring back what :func:`capture_rng` returned; CUDA only if there was a device and is one now."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
