"""What the commands do with adapters: `difftune merge`, and `difftune export` of one."""

import logging
from pathlib import Path

import torch
from peft import PeftModel
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from difftune.checkpoints.adapter_config import adapter_base
from difftune.checkpoints.adapters import load_with_base, save_adapter
from difftune.checkpoints.adapters_diffllama import export_adapter_diffllama
from difftune.checkpoints.diffllama import config_to_diffllama
from difftune.checkpoints.export import ExportReport, export_model
from difftune.checkpoints.folders import read_json, resolve_folder
from difftune.checkpoints.merge import MergeReport, logit_difference, merge_adapter
from difftune.checkpoints.publish import check_target
from difftune.data.tokenizers import build_tokenizer
from difftune.modeling.adapters import describe_adapter
from difftune.terminal import console, say, set_up_logging

log = logging.getLogger(__name__)

MERGED_FORMATS = {"merged": "difftune", "difftune": "difftune", "diffllama": "diffllama"}
"""Formats of one whole model, by the name on the command line."""


def merge(
    adapter: str,
    *,
    out: Path,
    base: str | None = None,
    format: str = "difftune",
    dtype: str | None = None,
    onto: str = "dequantized",
    overwrite: bool = False,
) -> ExportReport:
    """Merge an adapter into its base and write the model; print how far each step is from base and adapter.

    Args:
        adapter: A folder, hub id or training checkpoint with an adapter.
        out: The folder to make.
        base: The base model. None: the one that the adapter names.
        format: One of `MERGED_FORMATS`.
        dtype: Of the weights: float32, bfloat16, float16. None: as the base is stored.
        onto: What a base that was in 4 bits is merged as: `dequantized`, which is what was trained, or `original`.
        overwrite: Replace a model folder that is there.

    Raises:
        ValueError: If the adapter is none or is not of this base, the format cannot hold the model, a folder is there,
            or the logits differ by more than the budget. Nothing is written then.
    """
    set_up_logging()
    if format not in MERGED_FORMATS:
        raise ValueError(f"format {format!r} is unknown: a merged model is written as {_listed(MERGED_FORMATS)}")
    if onto not in ("dequantized", "original"):
        raise ValueError(f"a base is merged as 'dequantized' or 'original', got {onto!r}")
    target_dtype = _dtype(dtype)
    check_target(out, overwrite=overwrite)
    base = base or adapter_base(adapter)
    with console.status(escape(f"merging {adapter}")):
        adapted = load_with_base(adapter, base=base, base_as=onto)
        if MERGED_FORMATS[format] == "diffllama":
            config_to_diffllama(adapted.config)  # refuse before the work
        merged, report = merge_adapter(adapted, dtype=target_dtype)
        tokenizer = _tokenizer(adapter, base)
        exported = export_model(
            merged, tokenizer, out, MERGED_FORMATS[format], overwrite=overwrite, source=f"{adapter}, merged into {base}"
        )
    console.print(_merge_table(adapter, base, report, exported))
    if onto == "original":
        _tell_original(adapter, base, adapted)
    say(f"merged: {describe_adapter(adapted)}")
    say(f"exported {exported}")
    return exported


def export_adapter(
    adapter: str,
    *,
    out: Path,
    format: str = "peft",
    base: str | None = None,
    base_diffllama: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter in another format, and print what was checked.

    Args:
        adapter: A folder, hub id or training checkpoint with an adapter.
        out: The folder to make.
        format: `peft` (LoRA and lambda in one file, for our class), `diffllama-peft` (for plain transformers and PEFT),
            or one of `MERGED_FORMATS`.
        base: The base model. None: the one that the adapter names.
        base_diffllama: For `diffllama-peft`: the base, exported as DiffLlama. None: the base itself, if it is one.
        dtype: Of a merged model's weights.
        overwrite: Replace a folder that is there.

    Raises:
        ValueError: As :func:`merge`; or if an option does not belong to the format.
    """
    if format in MERGED_FORMATS:
        if base_diffllama is not None:
            raise ValueError(f"--base-diffllama belongs to the format diffllama-peft, not to {format}: leave it out")
        return merge(adapter, out=out, base=base, format=format, dtype=dtype, overwrite=overwrite).path
    format = "peft" if format == "auto" else format
    if format not in ("peft", "diffllama-peft"):
        raise ValueError(
            f"format {format!r} is unknown: an adapter is written as peft, diffllama-peft, {_listed(MERGED_FORMATS)}"
        )
    set_up_logging()
    if dtype is not None:
        raise ValueError(f"--dtype is for a merged model: the format {format} keeps the tensors as they were trained")
    if format == "peft" and base_diffllama is not None:
        raise ValueError("--base-diffllama belongs to the format diffllama-peft, not to peft: leave it out")
    check_target(out, overwrite=overwrite)
    base = base or adapter_base(adapter)
    if format == "peft":
        adapted = load_with_base(adapter, base=base)
        written = save_adapter(adapted, out, base=base, tokenizer=_tokenizer(adapter, base), overwrite=overwrite)
        say(f"{written}: peft, for the base {base}; {describe_adapter(adapted)}")
        return written
    foreign = base_diffllama or _diffllama_base(base)
    # DiffLlama's own weights are plain: what is compared are they.
    adapted = load_with_base(adapter, base=base, base_as="original")
    report = export_adapter_diffllama(adapted, out, base=foreign, overwrite=overwrite)
    say(str(report))
    return report.path


def _merge_table(adapter: str, base: str, report: MergeReport, exported: ExportReport) -> Table:
    table = Table(title=f"{adapter} merged into {base}", title_justify="left")
    table.add_column("largest difference of a logit")
    table.add_column("measured", justify="right")
    table.add_column("allowed", justify="right")
    rows = [("base and adapter to merged weights, in float32", report.max_abs_difference, report.budget)]
    if report.rounding is not None:
        rows.append(("the same to the rounded weights", report.rounding, report.rounding_budget))
    rows.append((f"merged to reloaded from disk as {exported.format}", exported.max_abs_difference, exported.budget))
    for name, measured, allowed in rows:
        table.add_row(name, f"{measured:.2e}", f"{allowed:.2e}")
    return table


def _tell_original(adapter: str, base: str, adapted: PeftModel) -> None:
    """How far a merge onto the weights before quantisation is from what was trained."""
    try:
        trained = load_with_base(adapter, base=base, base_as="dequantized")
    except ImportError as error:
        log.warning("how far this is from the model that was trained is not measured: %s", error)
        return
    if getattr(trained.get_base_model(), "dequantized_from", None) is None:
        say("the base was not in 4 bits when the adapter was trained: --onto makes no difference")
        return
    say(
        "the adapter was trained on 4-bit weights, and this is the base before it was quantised: the logits are off by "
        f"{logit_difference(trained, adapted):.2e} from those of the training; --onto dequantized keeps them"
    )


def _diffllama_base(base: str) -> str:
    """The base itself if plain transformers loads it."""
    if read_json(resolve_folder(base) / "config.json").get("model_type") == "diffllama":
        return base
    raise ValueError(
        f"the base {base} is no DiffLlama, so plain transformers does not load it: write it once with "
        f"`difftune export {base} --format diffllama --out DIR`, and give --base-diffllama DIR"
    )


def _tokenizer(*sources: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside an adapter, of its run, or of its base."""
    for source in sources:
        folder = resolve_folder(source)
        above = [parent / "tokenizer" for parent in folder.absolute().parents[:3]]
        for place in (folder, *above):
            if (place / "tokenizer_config.json").is_file():
                return build_tokenizer(str(place))
    log.warning("there is no tokenizer beside %s: the folder has none either", " or ".join(sources))
    return None


def _dtype(name: str | None) -> torch.dtype | None:
    names = ("float32", "bfloat16", "float16")
    if name is not None and name not in names:
        raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(names)}")
    return None if name is None else getattr(torch, name)


def _listed(names: dict[str, str]) -> str:
    return ", ".join(names)
