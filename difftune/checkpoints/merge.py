"""Merge an adapter into its base: one plain model, whose logits are compared before it is called done."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from difftune.checkpoints.compare import RELATIVE_BUDGET
from difftune.modeling import DiffTransformerForCausalLM
from difftune.modeling.adapters import activate_adapter, file_key, merged_tensors


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_adapter` measured; all None if it was not asked to."""

    max_abs_difference: float | None = None
    """Largest difference of two logits between adapter and merged weights, both in float32."""
    budget: float | None = None
    """What that had to stay within."""
    rounding: float | None = None
    """Largest difference of two logits of the merged model, rounded to its dtype, from the adapter in float32; None
    where nothing is rounded."""
    rounding_budget: float | None = None
    """What that had to stay within."""

    def __str__(self) -> str:
        """One line for the terminal."""
        if self.max_abs_difference is None:
            return "merged, not verified"
        rounded = "" if self.rounding is None else f"; its rounded weights differ by at most {self.rounding:.2e}"
        return f"merged: logits differ by at most {self.max_abs_difference:.2e} (budget {self.budget:.2e}){rounded}"


def merge_adapter(
    adapted: PeftModel, name: str = "default", *, dtype: torch.dtype | None = None, verify: bool = True
) -> tuple[DiffTransformerForCausalLM, MergeReport]:
    """Make a plain model of base and adapter; the adapted model stays as it is.

    The sums are taken in float32 and rounded once. Verified are the arithmetic (logits in
    float32, against the adapter) and the rounding: of the merged model it may cost twice what running base and adapter
    in that dtype costs, and four units in the last place of the largest logit.

    Args:
        adapted: The model that holds the adapter.
        name: Of the adapter.
        dtype: Of the merged weights; lambda stays float32. Default: the base's.
        verify: Compare. Needs memory for two float32 copies of the model.

    Returns:
        The merged model, in evaluation mode on the CPU, and what was measured.

    Raises:
        ValueError: If the base is quantised, or the logits differ by more than the budget.

    Example:
        >>> merged, report = merge_adapter(adapted)  # doctest: +SKIP
    """
    merged = _as_plain_model(adapted, name, dtype)
    if not verify:
        return merged, MergeReport()
    precise = full_precision(adapted, name)
    truth = sample_logits(precise)
    difference = _distance(sample_logits(_as_plain_model(precise, name)), truth)
    budget = RELATIVE_BUDGET * max(1.0, truth.abs().max().item())
    # Written so that NaN, which compares as False, is an error too.
    if not difference <= budget:
        raise ValueError(f"the merged logits differ from the adapter's by {difference:.3e}, allowed {budget:.3e}")
    rounding = allowed = None
    if merged.dtype != precise.get_base_model().dtype:
        own = _in_dtype(adapted, name, merged.dtype)
        rounding = _distance(sample_logits(merged), truth)
        scale = torch.finfo(merged.dtype).eps * truth.abs().max().item()
        allowed = 2 * _distance(sample_logits(own), truth) + 4 * scale
        if not rounding <= allowed:
            raise ValueError(
                f"rounded to {merged.dtype}, the merged logits are off by {rounding:.3e}, allowed {allowed:.3e}: "
                "merge into float32"
            )
    return merged, MergeReport(difference, budget, rounding, allowed)


def full_precision(adapted: PeftModel, name: str) -> PeftModel:
    """A copy on the CPU in float32 (float64 for a float64 model), in evaluation mode, with this adapter active."""
    clone = copy.deepcopy(adapted).cpu().eval()
    if clone.get_base_model().dtype != torch.float64:
        clone.float()
    activate_adapter(clone, name)
    return clone


def logit_difference(first: Any, second: Any) -> float:
    """Largest difference of two logits of two models on the CPU, on :func:`sample_logits`' tokens, in float32."""
    return _distance(sample_logits(first).float(), sample_logits(second).float())


def sample_logits(model: Any) -> torch.Tensor:
    """Logits of two rows of random tokens, the same for every model of a vocabulary."""
    tokens = min(64, model.config.max_position_embeddings)
    input_ids = torch.randint(model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def _in_dtype(adapted: PeftModel, name: str, dtype: torch.dtype) -> PeftModel:
    """A copy on the CPU whose base is in a dtype; LoRA and lambda stay as they are."""
    clone = copy.deepcopy(adapted).cpu().eval()
    for key, parameter in clone.named_parameters():
        if file_key(key, name) is None and "lambda_full" not in key:
            parameter.data = parameter.data.to(dtype)
    activate_adapter(clone, name)
    return clone


def _distance(actual: torch.Tensor, truth: torch.Tensor) -> float:
    difference = (actual.to(truth.dtype) - truth).abs().max().item()
    return difference if math.isfinite(difference) else math.nan


def _as_plain_model(adapted: PeftModel, name: str, dtype: torch.dtype | None = None) -> DiffTransformerForCausalLM:
    """Base and adapter in one; its tensors are its own."""
    base: Any = adapted.get_base_model()
    merged = merged_tensors(adapted, name, dtype=dtype)
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in merged.items()}
    if base.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = copy.deepcopy(base.config)
    model = DiffTransformerForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype or base.dtype
    )
    model.generation_config = copy.deepcopy(base.generation_config)
    model.config._name_or_path = base.config._name_or_path
    return model
