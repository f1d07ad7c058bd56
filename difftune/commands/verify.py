"""What `difftune verify` does: every promise tried on this machine, printed as it is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.configuration import ATTENTION_KINDS
from difftune.terminal import console, say, set_up_logging
from difftune.training.strategies import kind_of_device
from difftune.verification.backends import verify_backends
from difftune.verification.claim import Claim
from difftune.verification.files import verify_files
from difftune.verification.model import verify_model
from difftune.verification.precision import verify_precisions
from difftune.verification.small import small_like
from difftune.verification.training import verify_training

_DTYPES = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda", "auto")
_COLOURS = {"holds": "green", "not tried": "yellow", "fails": "red"}


def verify(model: str | None = None, *, dtype: str | None = None, device: str | None = None) -> int:
    """Try every promise and print what was found.

    Args:
        model: A folder, training checkpoint or hub id. None: a small fresh model of each kind of attention.
        dtype: Of its weights. None: as stored, or for a fresh one float32, and on a GPU bfloat16.
        device: `cpu`, `cuda` or `auto`. None: `auto`.

    Returns:
        0 if nothing fails, else 1.

    Raises:
        ValueError: If a name is unknown, there is no such device, or the model cannot be read.
    """
    set_up_logging()
    for what, value, known in (("dtype", dtype, _DTYPES), ("device", device, _DEVICES)):
        if value is not None and value not in known:
            raise ValueError(f"--{what} must be one of {', '.join(known)}, got {value!r}")
    where = torch.device(kind_of_device(device or "auto"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here (difftune doctor says why); choose cpu")
    counts: Counter[str] = Counter()
    for tried in _models(model, dtype, where):
        size = f"{tried.num_parameters():,} parameters, {str(tried.dtype).removeprefix('torch.')} on {where.type}"
        say(f": {tried.config.attention}, {size}", heading=model or "a fresh model")
        with TemporaryDirectory() as folder, console.status("working; the trainings take a minute or two"):
            subject = None
            for claim in _claims(tried, where, Path(folder)):
                if claim.on != subject:
                    subject = claim.on
                    console.print(subject, style="dim", highlight=False, markup=False, soft_wrap=True)
                counts[claim.state] += 1
                _show(claim)
    say(f"{counts['holds']} hold, {counts['fails']} fail, {counts['not tried']} could not be tried here")
    return 1 if counts["fails"] else 0


def _models(path: str | None, dtype: str | None, where: torch.device) -> Iterator[DiffTransformerForCausalLM]:
    """What is tried, in evaluation mode, on the CPU."""
    if path is not None:
        yield load_model(path, dtype=None if dtype is None else getattr(torch, dtype))
        return
    weights = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    for kind in ATTENTION_KINDS:
        large = DiffTransformerConfig(num_attention_heads=32, num_key_value_heads=16, head_dim=64, attention=kind)
        model = DiffTransformerForCausalLM(small_like(large))
        cast_weights(model, weights)
        yield model.eval()


def _claims(model: DiffTransformerForCausalLM, where: torch.device, folder: Path) -> Iterator[Claim]:
    """Everything that is tried with one model, the quick things first."""
    config = model.config
    # Float32 always: 16 bits alone would let an error of one percent pass.
    for dtype in dict.fromkeys((torch.float32, model.dtype)):
        yield from verify_backends(config, where, dtype)
    model.to(where)  # type: ignore[arg-type]  # the wrapper of transformers' `to` hides its arguments
    yield from verify_model(model)
    # What a large model fills is given back before others need it.
    model.to("cpu")  # type: ignore[arg-type]
    yield from verify_files(config, folder)
    devices = 2 if where.type == "cpu" else torch.cuda.device_count() if where.type == "cuda" else 1
    accelerator = {"cpu": "cpu", "cuda": "gpu"}.get(where.type, where.type)
    yield from verify_precisions(config, accelerator=accelerator)
    yield from verify_training(config, folder, accelerator=accelerator, devices=devices)


def _show(claim: Claim) -> None:
    console.print(
        f"  [{_COLOURS[claim.state]}]{claim.state:<9}[/] [bold]{claim.what}[/]: ", end="", soft_wrap=True, markup=True
    )
    console.print(claim.found, highlight=False, markup=False, soft_wrap=True)
