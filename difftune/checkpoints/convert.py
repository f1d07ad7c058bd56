"""Convert a checkpoint to another kind or layout: streamed, compared with its source, complete or absent.

Every source is opened as a stream of our own tensors, every target is written from one. In between stands, where the
kind of attention changes, a conversion of `upcycle.py`.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import difftune
from difftune.checkpoints.compare import Difference, compare, probe_rows, text_rows
from difftune.checkpoints.diffllama import write_diffllama
from difftune.checkpoints.llama import write_llama
from difftune.checkpoints.publish import check_target, model_card, new_folder, usage
from difftune.checkpoints.remote_code import write_remote_code
from difftune.checkpoints.shards import MAX_SHARD_BYTES, require_usable, write_shards
from difftune.checkpoints.sources import Source, open_source
from difftune.checkpoints.streams import TensorStream
from difftune.checkpoints.unilm import write_unilm
from difftune.checkpoints.unilm_config import SUBLN_EPS
from difftune.checkpoints.upcycle import (
    config_to_softmax,
    config_to_v1,
    config_to_v2,
    to_diff_v1,
    to_diff_v2,
    to_softmax,
)
from difftune.modeling import DiffTransformerConfig

TARGETS = ("diff_v2", "diff_v1", "diffllama", "unilm", "llama", "softmax")
"""What a checkpoint can be converted to."""

V1_SUBLN, V1_LAMBDA_INIT = "plain", 0.05
"""What loses least when a softmax model becomes V1, by the table in docs/how-to/convert.md."""

TEXT_TOKENS = 2048
"""How many tokens of a text the comparison reads."""

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_NAMES = {
    "diff_v2": "DIFF V2",
    "diff_v1": "DIFF V1",
    "diffllama": "DIFF V1",
    "unilm": "DIFF V1",
    "llama": "Llama",
    "softmax": "softmax (the baseline of a DIFF model)",
}


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_checkpoint` wrote and measured."""

    path: Path
    """The finished folder."""
    source: str
    """What was converted, as the user named it."""
    source_format: str
    """Its format, as the folder says."""
    target: str
    """One of ``TARGETS``."""
    method: str
    """How, in a sentence."""
    exact: bool
    """Whether the function is promised to be the same: then a difference above the budget is an error."""
    differences: list[Difference]
    """Measured after reloading, one for each kind of input."""
    seconds: float
    """Of writing and comparing."""
    peak_memory_gib: float
    """Largest resident memory of the process so far."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, for conversion.json."""
        return {
            **vars(self),
            "path": self.path.name,
            "differences": [difference.to_dict() for difference in self.differences],
            "difftune": difftune.__version__,
        }


@dataclass(frozen=True)
class _Plan:
    """From our tensors of the source to our tensors of the target."""

    config: DiffTransformerConfig
    stream: Callable[[TensorStream], TensorStream]
    method: str
    exact: bool


def convert_checkpoint(
    source: str | Path,
    to: str,
    out_dir: str | Path,
    *,
    subln: str | None = None,
    lambda_init: float | None = None,
    lambda_warmup_steps: int | None = None,
    text: Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:
    """Convert a checkpoint, compare the result with the source, and put it in its place with a model card.

    Memory: one output shard and one layer; for a GGUF file the whole model. The comparison runs both in float32,
    layer by layer.

    Args:
        source: A folder or hub id (Llama family, DiffLlama, difftune, Microsoft's layout), a GGUF file, or a state dict
            file with config.json beside it.
        to: One of ``TARGETS``.
        out_dir: The folder to make.
        subln: Sublayer norm of a softmax model that becomes ``diff_v1``. Default: :data:`V1_SUBLN`, which loses
            least.
        lambda_init: Its lambda at the start, the same in all layers. Default: :data:`V1_LAMBDA_INIT`.
        lambda_warmup_steps: Optimiser steps of training over which that lambda rises from almost 0. Default: none.
        text: UTF-8 file to compare the models on, beside random tokens.
        dtype: Of the weights. Default: as stored; another one rounds, and the comparison says by how much.
        overwrite: Replace a model folder that is there.
        max_shard_bytes: Largest weight file.

    Returns:
        What was written and measured; conversion.json and README.md in the folder say the same.

    Raises:
        ValueError: If the source is not readable (named), the target cannot express it, the folder exists, weights are
            missing, extra, quantised or not finite, or an exact conversion differs by more than rounding.

    Example:
        >>> convert_checkpoint("HuggingFaceTB/SmolLM2-135M", "diff_v2", "smol-diff")  # doctest: +SKIP
    """
    started = time.monotonic()
    if to not in TARGETS:
        raise ValueError(f"unknown target {to!r}: choose one of {', '.join(TARGETS)}")
    check_target(out_dir, overwrite=overwrite)
    content = None if text is None else _read_text(text)
    opened = open_source(source, dtype=dtype)
    if opened.folder is not None and opened.folder.absolute() == Path(out_dir).expanduser().absolute():
        raise ValueError(f"{out_dir} is the source itself: choose another folder")
    plan = _plan(opened, to, subln, lambda_init, lambda_warmup_steps)
    stored = next(opened.tensors())[1].dtype
    rounded = dtype is not None and torch.promote_types(dtype, stored) != dtype
    with new_folder(out_dir, overwrite=overwrite) as folder:
        checked = ((name, require_usable(name, tensor, opened.name)) for name, tensor in opened.tensors())
        _write(to, plan.config, _cast(plan.stream(checked), dtype), folder, dtype or stored, max_shard_bytes)
        _carry_along(opened, folder)
        rows = {"random tokens": probe_rows(opened.config.vocab_size, opened.config.max_position_embeddings)}
        if text is not None and content is not None:
            rows |= _rows_of_text(folder, text.name, content, opened.config.max_position_embeddings)
        differences = compare(opened.reference(), open_source(folder).reference(), rows)
        conversion = Conversion(
            path=Path(out_dir).expanduser().absolute(),
            source=opened.name,
            source_format=opened.format,
            target=to,
            method=plan.method + (f"; weights rounded from {stored} to {dtype}" if rounded else ""),
            exact=plan.exact and not rounded,
            differences=differences,
            seconds=round(time.monotonic() - started, 1),
            peak_memory_gib=round(_peak_memory_gib(), 2),
        )
        _require_close(conversion)
        (folder / "conversion.json").write_text(json.dumps(conversion.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(conversion, plan.config), encoding="utf-8")
    return conversion


def _plan(
    source: Source, to: str, subln: str | None, lambda_init: float | None, lambda_warmup_steps: int | None
) -> _Plan:
    """How to get there, or why it cannot be done."""
    config = source.config
    upcycled_to_v1 = config.attention == "softmax" and to in ("diff_v1", "diffllama", "unilm")
    choices = {"subln": subln, "lambda_init": lambda_init, "lambda_warmup_steps": lambda_warmup_steps}
    chosen = ", ".join(f"{name}={value!r}" for name, value in choices.items() if value is not None)
    if chosen and not (upcycled_to_v1 and to == "diff_v1"):
        raise ValueError(
            f"{chosen}: only a softmax model that becomes diff_v1 has this choice; leave it out, "
            f"{source.name} is {config.attention} and the target is {to}"
        )
    if upcycled_to_v1:
        # DiffLlama and Microsoft's layout always have the norm, and lambda by depth.
        norm = {"diffllama": "plain", "unilm": "affine"}.get(to, subln or V1_SUBLN)
        if to == "diff_v1" and lambda_init is None:
            lambda_init = V1_LAMBDA_INIT
        steps = lambda_warmup_steps or 0
        target = config_to_v1(config, subln=norm, lambda_init=lambda_init, lambda_warmup_steps=steps)
        if to == "unilm":
            target.subln_eps = SUBLN_EPS
        start = f", lambda warmed up over {steps:,} optimiser steps" if steps else ""
        method = f"heads of neighbouring key/value heads paired, sublayer norm {norm}{start}; the function changes"
        return _Plan(target, lambda tensors: to_diff_v1(config, target, tensors), method, exact=False)
    if to == "diff_v2" and config.attention != "diff_v2":
        method = "query heads doubled, lambda 1/2, output projection doubled: the same function"
        return _Plan(config_to_v2(config), lambda tensors: to_diff_v2(config, tensors), method, exact=True)
    if to in ("llama", "softmax"):
        method = "the same function" if config.attention == "softmax" else "pairs of equal heads merged: same function"
        return _Plan(config_to_softmax(config), lambda tensors: to_softmax(config, tensors), method, exact=True)
    if to != "diff_v2" and config.attention != "diff_v1":
        raise ValueError(
            f"{source.name} is {config.attention}, which is not converted to {to}: its keys and values are others; "
            "start from the softmax model"
        )
    return _Plan(config, lambda tensors: tensors, "the same weights in another layout", exact=True)


def _write(
    to: str, config: DiffTransformerConfig, tensors: TensorStream, folder: Path, dtype: torch.dtype, max_shard: int
) -> None:
    if to == "unilm":
        write_unilm(config, tensors, folder, max_shard_bytes=max_shard)
    elif to == "diffllama":
        write_diffllama(config, tensors, folder, dtype=dtype, max_shard_bytes=max_shard)
    elif to == "llama":
        write_llama(config, tensors, folder, dtype=dtype, max_shard_bytes=max_shard)
    else:
        config.dtype = dtype
        config.architectures = ["DiffTransformerForCausalLM"]
        write_shards(tensors, folder, max_shard_bytes=max_shard)
        config.save_pretrained(folder)
        write_remote_code(folder)


def _cast(tensors: TensorStream, dtype: torch.dtype | None) -> TensorStream:
    """Round the weights, but lambda, which is float32 everywhere."""
    for name, tensor in tensors:
        yield name, tensor if dtype is None or "lambda" in name else tensor.to(dtype)


def _carry_along(source: Source, folder: Path) -> None:
    """Tokenizer, chat template, generation config and licence, unchanged."""
    if source.save_companions is not None:
        source.save_companions(folder)
    elif source.folder is not None:
        for path in sorted(p for pattern in _COMPANIONS for p in source.folder.glob(pattern)):
            if path.is_file():
                target = folder / path.relative_to(source.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _read_text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not content.strip():
        raise ValueError(f"{path} is empty: give a text to compare the models on")
    return content


def _rows_of_text(folder: Path, name: str, content: str, longest: int) -> dict[str, list[list[int]]]:
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"the source has no tokenizer, so {name} cannot be read: leave the text out, or add one")
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(content)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"{name} has {len(ids)} tokens: give a text of at least 2")
    part = f"first {TEXT_TOKENS:,} of {len(ids):,} tokens" if len(ids) > TEXT_TOKENS else f"{len(ids):,} tokens"
    return {f"{name} ({part})": list(text_rows(ids, longest, TEXT_TOKENS))}


def _require_close(conversion: Conversion) -> None:
    for found in conversion.differences:
        if found.within_budget or (not conversion.exact and found.max_abs_logit < float("inf")):
            continue
        raise ValueError(
            f"the {conversion.target} checkpoint differs from {conversion.source} on {found.inputs}: logits by up to "
            f"{found.max_abs_logit:.3e}, allowed {found.budget:.3e}; nothing was written. "
            "NaN means that the source itself has non-finite logits"
        )


def _card(conversion: Conversion, config: DiffTransformerConfig) -> str:
    name, to = conversion.path.name, conversion.target
    how = usage(name, brings_code=to in ("diff_v1", "diff_v2", "softmax"))
    if to == "unilm":
        how = "The tensors have the names and layout of Microsoft's repository; `difftune convert` reads them."
    promise = "exact: a difference above the budget would have been an error" if conversion.exact else "not exact"
    lines = [
        "| inputs | tokens | largest logit difference | largest logit | mean KL | same top | NLL before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in conversion.differences:
        cells = [found.inputs, f"{found.tokens:,}", f"{found.max_abs_logit:.2e}", f"{found.logit_scale:.2f}"]
        cells += [f"{found.kl:.2e}", f"{found.same_top:.2%}", f"{found.nll_before:.4f}", f"{found.nll_after:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return model_card(
        name,
        about=f"A {_NAMES[to]} model, converted from {conversion.source}",
        usage=how,
        rows={
            "source": f"{conversion.source} ({conversion.source_format})",
            "format": to,
            "method": conversion.method,
            "promise": promise,
            "attention": f"{config.attention}, {config.num_attention_heads} softmax maps, "
            f"{config.num_key_value_heads} key/value heads",
        },
        details="## Measured difference from the source\n\nReloaded from disk, run in float32; nats a token.\n\n"
        + "\n".join(lines),
    )


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
