"""The files of an adapter: complete or not there, and read back before they are called done."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from difftune.checkpoints.publish import new_folder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def write_adapter(
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    out_dir: str | Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
) -> Path:
    """Write config and tensors to a new folder, and read them back before that is called done.

    Args:
        config: For ``adapter_config.json``.
        tensors: By PEFT's names.
        out_dir: The folder to make.
        name: Of the adapter, for messages.
        tokenizer: Saved beside it. None: none is.
        overwrite: Replace an adapter that is there.

    Raises:
        ValueError: If the folder exists, or a tensor is not finite (named).
    """
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"adapter {name!r} is not saved: {bad[0]} and {len(bad) - 1} more tensors are not finite")
    # Neither views nor shared memory go into a safetensors file.
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    target = Path(out_dir).expanduser().absolute()
    with new_folder(target, overwrite=overwrite) as folder:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        written = load_file(folder / ADAPTER_WEIGHTS)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(tensor, written[key]) for key, tensor in tensors.items())
    return target
