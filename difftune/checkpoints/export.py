"""Write a model for the rest of the world: one folder, complete and verified, or nothing at all."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from difftune.checkpoints.compare import RELATIVE_BUDGET
from difftune.checkpoints.diffllama import config_to_diffllama, export_diffllama
from difftune.checkpoints.llama import config_to_llama, write_llama
from difftune.checkpoints.publish import model_card, new_folder, usage
from difftune.checkpoints.remote_code import write_remote_code
from difftune.checkpoints.shards import MAX_SHARD_BYTES
from difftune.checkpoints.special_tokens import write_special_tokens
from difftune.checkpoints.streams import HEAD
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.quantized import quantization_of


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote and measured."""

    path: Path
    """The finished folder."""
    format: str
    """``difftune``, ``diffllama`` or ``llama``."""
    reloaded_as: str | None
    """Class that reloaded the folder for the comparison; None if it was not verified."""
    max_abs_difference: float | None
    """Largest difference of two logits between the model and its reloaded export; None if not verified."""
    budget: float | None
    """What the difference had to stay within; None if not verified."""

    def __str__(self) -> str:
        """One line for the terminal and the model card."""
        if self.max_abs_difference is None:
            return f"{self.path}: {self.format}, not verified"
        return (
            f"{self.path}: {self.format}, reloaded as {self.reloaded_as}, "
            f"logits differ by at most {self.max_abs_difference:.2e} (budget {self.budget:.2e})"
        )


def export_model(
    model: DiffTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | Path,
    format: str = "diffllama",
    *,
    verify: bool = True,
    overwrite: bool = False,
    source: str | None = None,
) -> ExportReport:
    """Write model, tokenizer, generation config and a model card to a folder that others load.

    The folder is written under a temporary name beside its place, reloaded from disk through the class that
    its readers will use, compared by logits in float32 (float64 for a float64 model), and only then renamed.
    On any error nothing is left behind, and a folder that was to be overwritten is untouched.

    Args:
        model: To be exported; not changed.
        tokenizer: Saved beside it; None for a model without one.
        out_dir: The folder to make.
        format: ``diffllama`` (diff_v1) or ``llama`` (softmax), which plain transformers loads; or ``difftune`` (keeps
            every variant, and brings its code: transformers loads it with ``trust_remote_code=True``).
        verify: Reload and compare. Needs memory for a second copy of the model, a third if it is not float32.
        overwrite: Replace an existing model folder.
        source: Where the model comes from, for the card. Default: the name it was loaded by.

    Returns:
        What was written, and the largest difference measured.

    Raises:
        ValueError: If the format is unknown, the folder exists, the tokenizer has more tokens than the model,
            the format cannot express the model, or the reloaded model differs by more than the budget.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py`` for the foreign class.

    Example:
        >>> print(export_model(model, tokenizer, "export", format="diffllama"))  # doctest: +SKIP
    """
    if format not in _WRITERS:
        raise ValueError(f"unknown export format {format!r}: choose one of {', '.join(sorted(_WRITERS))}")
    if not isinstance(model, DiffTransformerForCausalLM):
        raise ValueError(
            f"only a DiffTransformerForCausalLM can be exported, got {type(model).__name__}: "
            "unwrap it, and merge adapters, first"
        )
    if quantization_of(model) is not None:
        raise ValueError("a model in 4 bits is not exported: export the weights that it was loaded from")
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}: "
            "export it with the tokenizer that it was trained with"
        )
    if format == "diffllama":
        config_to_diffllama(model.config)  # refuse before anything is written
    elif format == "llama":
        config_to_llama(model.config)
    target = Path(out_dir).expanduser().absolute()
    with new_folder(target, overwrite=overwrite) as written:
        _WRITERS[format](model, written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
            write_special_tokens(written, tokenizer)
        reloaded_as, difference, budget = _compare(model, written) if verify else (None, None, None)
        report = ExportReport(target, format, reloaded_as, difference, budget)
        (written / "README.md").write_text(_model_card(model, report, source), encoding="utf-8")
    return report


def auto_format(config: DiffTransformerConfig) -> str:
    """The format that ``auto`` stands for: the one that plain transformers loads, where one can hold the model.

    Example:
        >>> [auto_format(DiffTransformerConfig(attention=kind)) for kind in ("diff_v1", "diff_v2", "softmax")]
        ['diffllama', 'difftune', 'llama']
    """
    for name, translate in (("diffllama", config_to_diffllama), ("llama", config_to_llama)):
        try:
            translate(config)
        except ValueError:
            continue
        return name
    return "difftune"


def _write_difftune(model: DiffTransformerForCausalLM, folder: Path) -> None:
    """Write the model's own format, with the code that loads it where difftune is not installed."""
    model.save_pretrained(folder)
    write_remote_code(folder)


def _write_llama(model: DiffTransformerForCausalLM, folder: Path) -> None:
    """Write a model of the kind ``softmax`` as the member of the Llama family that it is."""
    # A tied head is the embedding, and stands in no file.
    state = model.state_dict()
    tensors = ((n, t.cpu()) for n, t in state.items() if n != HEAD or not model.config.tie_word_embeddings)
    write_llama(model.config, tensors, folder, dtype=model.dtype, max_shard_bytes=MAX_SHARD_BYTES)
    model.generation_config.save_pretrained(folder)


_WRITERS: dict[str, Callable[[DiffTransformerForCausalLM, Path], None]] = {
    "difftune": _write_difftune,
    "diffllama": export_diffllama,
    "llama": _write_llama,
}


def _compare(model: DiffTransformerForCausalLM, folder: Path) -> tuple[str, float, float]:
    """Reload ``folder`` with transformers alone and compare logits; returns class name, difference, budget."""
    ours = _full_precision_on_cpu(model)
    auto: Any = AutoModelForCausalLM  # its stub does not know output_loading_info
    reloaded, info = auto.from_pretrained(folder, dtype=ours.dtype, output_loading_info=True, trust_remote_code=False)
    wrong = {what: names for what, names in info.items() if names}
    if wrong:
        raise ValueError(f"{type(reloaded).__name__} does not find its tensors in the export: {wrong}")
    tokens = min(64, model.config.max_position_embeddings)
    input_ids = torch.randint(model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(input_ids=input_ids, use_cache=False).logits
        actual = reloaded(input_ids=input_ids, use_cache=False).logits
    difference = (actual - expected).abs().max().item()
    budget = RELATIVE_BUDGET * max(1.0, expected.abs().max().item())
    # Written so that NaN, which compares as False, is an error too.
    if not (math.isfinite(difference) and difference <= budget):
        raise ValueError(
            f"the export reloaded as {type(reloaded).__name__} differs from the model: logits by up to "
            f"{difference:.3e}, allowed {budget:.3e}; nothing was written. "
            "NaN means that the model itself has non-finite weights or logits"
        )
    return type(reloaded).__name__, difference, budget


def _full_precision_on_cpu(model: DiffTransformerForCausalLM) -> DiffTransformerForCausalLM:
    """The model itself if it is in float32 or float64 on the CPU, else a float32 copy there."""
    weights = list(model.parameters())
    if all(w.device.type == "cpu" and w.dtype in (torch.float32, torch.float64) for w in weights):
        return model
    clone: Any = copy.deepcopy(model)
    return clone.to("cpu", torch.float32)


def _model_card(model: DiffTransformerForCausalLM, report: ExportReport, source: str | None) -> str:
    """The README.md of the exported folder."""
    config = model.config
    verified = (
        f"reloaded as {report.reloaded_as}: logits differ from the trained model's by at most "
        f"{report.max_abs_difference:.2e} (allowed {report.budget:.2e})"
        if report.max_abs_difference is not None
        else "not verified"
    )
    size = (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"{model.num_parameters():,} parameters"
    )
    heads = f"{config.num_attention_heads} softmax maps, {config.num_key_value_heads} key/value heads"
    return model_card(
        report.path.name,
        about="A model with softmax attention, exported"
        if config.attention == "softmax"
        else "A Differential Transformer (arXiv:2410.05258), exported",
        usage=usage(report.path.name, brings_code=report.format == "difftune"),
        rows={
            "source": source or config._name_or_path or "trained from scratch",
            "format": report.format,
            "attention": f"{config.attention}, {heads}",
            "size": size,
            "verified": verified,
        },
    )
