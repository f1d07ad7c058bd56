"""What leaves difftune: an export that is loaded again by transformers, and an adapter that is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from difftune.checkpoints.export import export_model
from difftune.checkpoints.merge import merge_adapter
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter, trained_parameters
from difftune.verification.claim import Claim, not_tried
from difftune.verification.small import small_like


def verify_files(config: DiffTransformerConfig, folder: Path) -> Iterator[Claim]:
    """Export a small model with the attention of another one in both formats, and merge an adapter of it.

    Args:
        config: Of the other one.
        folder: Where the exports are written.

    Yields:
        A claim for each format, and one for the merge.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiffTransformerForCausalLM(small_like(config)).eval()
        on = f"files of a model of two layers, {config.attention}, D={config.head_dim}: logits in float32"
        for name in ("difftune", "diffllama"):
            what = f"export as {name}, loaded by transformers = ours"
            if name == "diffllama" and config.attention != "diff_v1":
                yield not_tried(what, on, f"transformers' DiffLlama is diff_v1, this is {config.attention}")
            else:
                yield _tried(what, on, lambda name=name: _export(model, folder / name, name))  # type: ignore[misc]
        yield _tried("adapter merged = beside the base", on, lambda: _merge(model))


def _export(model: DiffTransformerForCausalLM, folder: Path, name: str) -> tuple[float | None, float | None]:
    report = export_model(model, None, folder, name)
    return report.max_abs_difference, report.budget


def _merge(model: DiffTransformerForCausalLM) -> tuple[float | None, float | None]:
    adapted = add_adapter(model, AdapterSettings(rank=4))
    with torch.no_grad():
        # At the start an adapter changes nothing.
        for parameter in trained_parameters(adapted).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _, report = merge_adapter(adapted)
    return report.max_abs_difference, report.budget


def _tried(what: str, on: str, work: Callable[[], tuple[float | None, float | None]]) -> Claim:
    """Export and merge compare logits by themselves, and refuse what differs."""
    try:
        difference, budget = work()
    except ValueError as error:
        return Claim(what, on, "fails", str(error))
    return Claim(what, on, "holds", f"a logit differs by {difference:.1e}, allowed {budget:.1e}")
