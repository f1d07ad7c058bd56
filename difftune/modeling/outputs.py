"""What a forward gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class DiffCausalLMOutput(CausalLMOutputWithPast):
    """Output of a forward: with labels the loss, without labels the logits.

    With labels no logits are held: the loss is computed without them. Who reads ``logits`` all the same gets them
    then, from ``last_hidden_state``; they are not among the keys and values.

    Attributes:
        loss: Mean cross entropy a label token in nats (``loss_sum`` over ``num_items_in_batch`` where given).
        loss_sum: Sum over the label tokens, shape ``()``.
        num_label_tokens: How many there are, int64, shape ``()``.
        last_hidden_state: With labels, what the head is applied to, shape ``(B, T, C)``: for other losses of it.
    """

    loss_sum: torch.Tensor | None = None
    num_label_tokens: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None

    def compute_logits_by(self, head: Callable[[torch.Tensor], torch.Tensor]) -> DiffCausalLMOutput:
        """Let ``logits``, where none are held, be ``head(last_hidden_state)`` when they are read; returns itself."""
        vars(self)["_head"] = head
        return self


def _read_logits(output: DiffCausalLMOutput) -> torch.Tensor | None:
    held: dict[str, Any] = vars(output)
    if held.get("_logits") is None and "_head" in held:
        hidden = output.last_hidden_state
        assert hidden is not None
        held["_logits"] = held["_head"](hidden)
    return held.get("_logits")


def _hold_logits(output: DiffCausalLMOutput, logits: torch.Tensor | None) -> None:
    vars(output)["_logits"] = logits


# A property in the place of the dataclass's field: set by its __init__, read by everyone.
DiffCausalLMOutput.logits = property(_read_logits, _hold_logits)  # type: ignore[assignment]
