"""Our adapters for plain transformers: one LoRA on DiffLlama's fused projections, exact, for plain PEFT.

``q_proj`` of DiffLlama is our ``q1_proj`` on top of ``q2_proj``. Two updates of ranks r1 and r2 on the parts are one of
rank r1 + r2 on the whole: ``A`` is ``[A1; A2]`` and ``B`` is block diagonal, with the scalings inside. lambda is bare
parameters there, which PEFT cannot train or carry: it goes into a file of its own, which replaces tensors of the base.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import DiffLlamaForCausalLM

import difftune
from difftune.checkpoints.adapter_config import FOREIGN
from difftune.checkpoints.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from difftune.checkpoints.compare import RELATIVE_BUDGET
from difftune.checkpoints.diffllama import config_to_diffllama, weights_to_diffllama
from difftune.checkpoints.folders import read_json, resolve_folder
from difftune.checkpoints.layouts import fold_norm_weight, groups_to_halves, join_pair
from difftune.checkpoints.merge import full_precision, sample_logits
from difftune.checkpoints.publish import new_folder
from difftune.modeling.adapters import base_tensors, lora_layers, trained_parameters

BASE_PATCH = "base_patch.safetensors"
"""Tensors of the base that were trained whole, by DiffLlama's names."""

UNPATCHED = " (apply base_patch.safetensors to it first, see README.md)"
"""Follows the name of the base in the config of an adapter that needs the patch."""

_PREFIX = "base_model.model."
_PAIRS = {"q1_proj": "q_proj", "q2_proj": "q_proj", "k1_proj": "k_proj", "k2_proj": "k_proj"}


@dataclass(frozen=True)
class AdapterExportReport:
    """What :func:`export_adapter_diffllama` wrote and measured."""

    path: Path
    """The finished folder."""
    patched: int
    """Tensors in the base patch; 0: there is none, and none is needed."""
    max_abs_difference: float | None
    """Largest difference of two logits between ours and plain transformers with PEFT; None if not verified."""
    budget: float | None
    """What that had to stay within."""
    without_patch: float | None
    """The same difference where the patch is forgotten; None if there is none, or not verified."""

    def __str__(self) -> str:
        """Lines for the terminal."""
        verified = (
            "not verified"
            if self.max_abs_difference is None
            else "logits in plain transformers differ by at most "
            f"{self.max_abs_difference:.2e} (budget {self.budget:.2e})"
        )
        lines = [f"{self.path}: diffllama-peft, {verified}"]
        if self.patched:
            cost = "" if self.without_patch is None else f": without it the logits are off by {self.without_patch:.2e}"
            lines.append(f"PEFT does not apply {BASE_PATCH}; README.md has the two lines that do{cost}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Update:
    """LoRA of one projection with a scaling of 1, and DoRA's magnitude where there is one."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor | None


def export_adapter_diffllama(
    adapted: PeftModel,
    out_dir: str | Path,
    *,
    base: str | Path,
    name: str = "default",
    verify: bool = True,
    overwrite: bool = False,
) -> AdapterExportReport:
    """Write an adapter for ``DiffLlamaForCausalLM`` and plain PEFT, and whatever of the base was trained beside it.

    Args:
        adapted: A ``diff_v1`` model with the adapter.
        out_dir: The folder to make.
        base: The DiffLlama folder or hub id that the adapter is for: the base of ``adapted``, exported.
        name: Of the adapter.
        verify: Load base, patch and adapter as a user would, and compare logits in float32.
        overwrite: Replace an adapter that is there.

    Returns:
        What was written, and what it differs with the patch and without.

    Raises:
        ValueError: If DiffLlama cannot express the model, the adapter has no LoRA, ``base`` is no DiffLlama, or the
            logits differ by more than the budget. Nothing is written then.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``; PEFT's file format.

    Example:
        >>> export_adapter_diffllama(adapted, "maths-diffllama", base="my-model-diffllama")  # doctest: +SKIP
    """
    precise = full_precision(adapted, name)
    inner: Any = precise.get_base_model()
    config = inner.config
    config_to_diffllama(config)  # refuse before anything is written
    model_type = read_json(resolve_folder(base) / "config.json").get("model_type")
    if model_type != "diffllama":
        raise ValueError(
            f"{base} holds model_type {model_type!r}: export the base with format='diffllama', and name that"
        )
    before = base_tensors(precise)
    trained = _trained_whole(precise, name)
    after = {key: trained.get(key, tensor) for key, tensor in before.items()}
    updates = fused_updates(precise, after, name)
    if not updates:
        raise ValueError(f"adapter {name!r} has no LoRA for PEFT to load: merge it and export the model as diffllama")
    foreign_before, foreign_after = (weights_to_diffllama(tensors, config) for tensors in (before, after))
    patch = {
        key: tensor.contiguous()
        for key, tensor in foreign_after.items()
        if not torch.equal(tensor, foreign_before[key])
    }
    target = Path(out_dir).expanduser().absolute()
    with new_folder(target, overwrite=overwrite) as folder:
        if patch:
            save_file(patch, folder / BASE_PATCH, metadata={"format": "pt"})
        _write_adapter(updates, folder, base)
        measured = _compare(precise, folder, base, has_patch=bool(patch)) if verify else (None, None, None)
        report = AdapterExportReport(target, len(patch), *measured)
        (folder / "README.md").write_text(_card(report, str(base)), encoding="utf-8")
    return report


def check_base_patch(model: torch.nn.Module, source: str | Path) -> None:
    """Raise unless the base patch of an exported adapter has been applied to a model.

    Args:
        model: A DiffLlama, with the adapter or without.
        source: The adapter's folder or hub id.

    Raises:
        ValueError: If a tensor is not the one that was trained (named), or the patch is missing or not the adapter's.

    Example:
        >>> check_base_patch(model, "maths-diffllama")  # doctest: +SKIP
    """
    folder = resolve_folder(source)
    record = (read_json(folder / ADAPTER_CONFIG).get("auto_mapping") or {}).get(FOREIGN)
    if record is None:
        raise ValueError(f"{folder} is no adapter for DiffLlama that difftune exported: there is nothing to check")
    if record["base_patch_sha256"] is None:
        return
    path = folder / BASE_PATCH
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != record["base_patch_sha256"]:
        raise ValueError(f"{path} is missing or is not that of the adapter beside it: export the adapter again")
    names = _plain_parameters(model)
    for name, tensor in load_file(path).items():
        if name not in names or not torch.equal(names[name].detach().cpu(), tensor.to(names[name].dtype)):
            raise ValueError(
                f"{name} is not what {path} says: the base patch was not applied, and this is another model than the "
                "one that was trained; README.md beside it has the two lines that apply it"
            )


def fused_updates(model: Any, weights: dict[str, torch.Tensor], name: str) -> dict[str, _Update]:
    """The updates of an adapter in DiffLlama's layout, by the name of the projection there.

    Args:
        model: A ``diff_v1`` model with the adapter, in full precision.
        weights: Its tensors by our names, with modules trained whole in place: an affine sublayer norm is folded into
            the output projection, so into its update too.
        name: Of the adapter.
    """
    layers = lora_layers(model, name)
    num_groups = model.config.num_kv_groups
    updates: dict[str, _Update] = {}
    for projection in layers:
        stem, _, leaf = projection.rpartition(".")
        if leaf in _PAIRS:
            pair = [f"{stem}.{leaf[0]}{number}_proj" for number in (1, 2)]
            parts = [_read_update(layers.get(part), weights[f"{part}.weight"], name) for part in pair]
            updates[f"{stem}.{_PAIRS[leaf]}"] = _join(*parts)
            continue
        update = _read_update(layers[projection], weights[f"{projection}.weight"], name)
        norm = weights.get(f"{stem}.subln.weight")
        if leaf == "v_proj":
            rows = None if update.magnitude is None else groups_to_halves(update.magnitude, num_groups)
            update = _Update(update.lora_a, groups_to_halves(update.lora_b, num_groups), rows)
        elif leaf == "o_proj" and norm is not None:
            update = _fold(update, weights[f"{projection}.weight"], norm)
        updates[projection] = update
    return updates


def _read_update(layer: Any, weight: torch.Tensor, name: str) -> _Update:
    """The update of a layer, of rank 0 where it has none; the magnitude then is what the weight has."""
    if layer is None:
        rows, columns = weight.shape
        return _Update(weight.new_zeros(0, columns), weight.new_zeros(rows, 0), torch.linalg.norm(weight, dim=1))
    magnitude = layer.lora_magnitude_vector[name].weight.detach() if name in layer.lora_magnitude_vector else None
    return _Update(
        layer.lora_A[name].weight.detach(), layer.scaling[name] * layer.lora_B[name].weight.detach(), magnitude
    )


def _join(first: _Update, second: _Update) -> _Update:
    """The update of a projection whose rows are those of two."""
    magnitude = None
    if first.magnitude is not None and second.magnitude is not None:
        magnitude = join_pair(first.magnitude, second.magnitude)
    return _Update(torch.cat([first.lora_a, second.lora_a]), torch.block_diag(first.lora_b, second.lora_b), magnitude)


def _fold(update: _Update, weight: torch.Tensor, norm: torch.Tensor) -> _Update:
    """The update of an output projection whose columns take up the norm's weight."""
    folded, magnitude = fold_norm_weight(update.lora_a, norm), update.magnitude
    if magnitude is not None:
        # The weight changes the length of the rows; DoRA divides by it.
        total = weight + update.lora_b @ update.lora_a
        magnitude = (
            magnitude * torch.linalg.norm(fold_norm_weight(total, norm), dim=1) / torch.linalg.norm(total, dim=1)
        )
    return _Update(folded, update.lora_b, magnitude)


def _write_adapter(updates: dict[str, _Update], folder: Path, base: str | Path) -> None:
    """Write PEFT's two files. Alpha is the rank, so that PEFT scales by exactly 1."""
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for projection, update in updates.items():
        tensors[f"{_PREFIX}{projection}.lora_A.weight"] = update.lora_a.contiguous()
        tensors[f"{_PREFIX}{projection}.lora_B.weight"] = update.lora_b.contiguous()
        if update.magnitude is not None:
            tensors[f"{_PREFIX}{projection}.lora_magnitude_vector"] = update.magnitude.contiguous()
        leaf, rank = projection.rpartition(".")[2], update.lora_a.shape[0]
        if ranks.setdefault(leaf, rank) != rank:
            raise ValueError(f"{leaf} has another rank in {projection} than in earlier layers: not exported")
    highest = max(ranks.values())
    patch, named, digest = folder / BASE_PATCH, str(base), None
    if patch.is_file():
        # A loader that fetches the base by itself would leave the patch out: it shall find no such model.
        named, digest = f"{base}{UNPATCHED}", hashlib.sha256(patch.read_bytes()).hexdigest()
    LoraConfig(
        r=highest,
        lora_alpha=highest,
        target_modules=sorted(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        use_dora=any(update.magnitude is not None for update in updates.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=named,
        auto_mapping={FOREIGN: {"base_patch_sha256": digest}},
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _compare(
    precise: PeftModel, folder: Path, base: str | Path, *, has_patch: bool
) -> tuple[float, float, float | None]:
    """Load what was written as a user would; the difference of the logits, its budget, and that without the patch."""
    truth = sample_logits(precise)
    plain: Any = DiffLlamaForCausalLM.from_pretrained(resolve_folder(base), dtype=truth.dtype)
    foreign = PeftModel.from_pretrained(plain, str(folder)).eval()
    without = (sample_logits(foreign) - truth).abs().max().item() if has_patch else None
    if has_patch:
        names = _plain_parameters(foreign)
        with torch.no_grad():
            for name, tensor in load_file(folder / BASE_PATCH).items():
                names[name].copy_(tensor)
        check_base_patch(foreign, folder)
    difference = (sample_logits(foreign) - truth).abs().max().item()
    budget = RELATIVE_BUDGET * max(1.0, truth.abs().max().item())
    # Written so that NaN, which compares as False, is an error too.
    if not (math.isfinite(difference) and difference <= budget):
        raise ValueError(
            f"in plain transformers, on {base}, the logits differ from the adapter's by up to {difference:.3e}, "
            f"allowed {budget:.3e}; nothing was written. Is {base} the export of the base that it was trained on?"
        )
    return difference, budget, without


def _plain_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by the names that they have without PEFT."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", ".").removeprefix(_PREFIX): parameter for name, parameter in named}


def _trained_whole(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of modules that were trained whole, by our names."""
    return {key.removeprefix(_PREFIX): parameter.detach() for key, parameter in trained_parameters(model, name).items()}


def _card(report: AdapterExportReport, base: str) -> str:
    """The README.md of the folder."""
    patch = f"""
**Without the base patch this is another model than the one that was trained.** lambda, and whatever else is not LoRA,
was trained whole, and PEFT does not load it: `{BASE_PATCH}` replaces {report.patched} tensors of the base.
The two lines below that name the patch apply it, before PEFT comes in.

Loaders that fetch the base by themselves (`AutoPeftModel`, servers) would leave the patch out, so `adapter_config.json`
names no base that they find: for them, merge the adapter. Where difftune is installed,
`difftune.checkpoints.adapters_diffllama.check_base_patch(model, "{report.path.name}")` raises if the patch is missing.
"""
    lines = f"""patch = load_file("{report.path.name}/{BASE_PATCH}")  # the base patch:
assert not model.load_state_dict(patch, strict=False).unexpected_keys  # lambda, as trained
"""
    return f"""---
library_name: peft
base_model: {base}
---

# {report.path.name}

A LoRA adapter for the DiffLlama in `{base}`, exported by difftune {difftune.__version__}. Plain transformers and PEFT
load it.
{patch if report.patched else ""}
```python
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
{lines if report.patched else ""}model = PeftModel.from_pretrained(model, "{report.path.name}")
```

{report}
"""
