"""What a checkpoint of an adapter has to hold before a run goes on from it."""

from collections.abc import Mapping
from typing import Any

import torch

_SHOWN = 4
# Where the base lies and which version of PEFT wrote the file may change between two parts of a run.
_MAY_CHANGE = {"base_model_name_or_path", "peft_version"}
_BASE = "auto_mapping"


def check_adapter(
    checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None, trained: Mapping[str, torch.Size]
) -> None:
    """Raise unless a checkpoint was written by a run that trains the same: the whole model, or this adapter.

    Args:
        checkpoint: As Lightning loaded it.
        config: Of the adapter that is trained now, as in ``adapter_config.json``; None: the whole model is.
        trained: Shape by name of what is trained, as in the state dict.

    Raises:
        ValueError: If one trains an adapter and the other does not, the adapters or their bases differ (what differs is
            named), or the tensors are not exactly those that are trained (missing, extra and misshapen ones are named).
    """
    theirs = checkpoint.get("adapter_config")
    if theirs is None and config is None:
        return
    if theirs is None or config is None:
        kinds = ("an adapter", "the whole model")
        saved, now = kinds if config is None else kinds[::-1]
        raise ValueError(
            f"the checkpoint is of a run that trains {saved}, this one trains {now}: choose another run_dir"
        )
    if theirs.get(_BASE) != config.get(_BASE):
        raise ValueError(
            f"the checkpoint was trained on another base ({theirs.get('base_model_name_or_path')}) than this run has "
            f"({config.get('base_model_name_or_path')}): an adapter goes on with its own base alone"
        )
    # A key that only one of them has is of another version of PEFT.
    differing = [key for key in sorted(theirs.keys() & config.keys() - _MAY_CHANGE) if theirs[key] != config[key]]
    if differing:
        told = [f"{key} is {config[key]!r} here and {theirs[key]!r} there" for key in differing]
        raise ValueError(f"the checkpoint is of another adapter: {'; '.join(told)}. Choose another run_dir")
    held = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
    problems = [
        f"{len(names)} {word} ({', '.join(sorted(names)[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for word, names in (
            ("missing", trained.keys() - held.keys()),
            ("extra", held.keys() - trained.keys()),
            ("of another shape", {name for name, shape in held.items() if trained.get(name, shape) != shape}),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the weights in the checkpoint are not those that are trained: {'; '.join(problems)}")
