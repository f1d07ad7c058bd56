"""A frozen teacher in the process: what it says to a batch, and the top k of it to be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from difftune.losses import TeacherStates, TopK, top_k
from difftune.modeling import DiffTransformerForCausalLM
from difftune.modeling.quantized import quantization_of
from difftune.training.sharding import move_unsharded

# Two documents of different length, so that a teacher that lets them see one another is found out.
_PROBE_LENGTHS = (3, 5)


class OnlineTeacher:
    """Runs a frozen model without gradients. Not a module: it is neither trained nor saved with what is.

    Args:
        model: Ours, or any causal language model of transformers whose logits are a linear function of its last hidden
            states. It is put into evaluation mode, and its parameters are frozen.
        vocab_size: Rows of the student's head. More rows of the teacher's are left out: they belong to no token that
            the student has.
        load_weights: Called with the model and ``device`` when it has been sharded, to fill what is on the meta device.
            None: the model has its weights, or needs none.

    Raises:
        ValueError: If the teacher's head has fewer rows, if its logits are not its head applied to its hidden states
            (scaled or capped logits, a bias), or if documents packed into one row would see one another; these two
            not before :meth:`to`, if there is ``load_weights``.
    """

    def __init__(
        self, model: PreTrainedModel, *, vocab_size: int, load_weights: Callable[..., None] | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._name = type(model).__name__
        self._load_weights = load_weights
        self._is_ours = isinstance(model, DiffTransformerForCausalLM)
        rows = self._head().shape[0]
        if rows < vocab_size:
            raise ValueError(
                f"the teacher's vocabulary has {rows} rows, the student's {vocab_size}: a teacher must know every "
                "token of its student; choose a teacher with the same tokenizer"
            )
        self._vocab_size = vocab_size
        # A method of the model, so that sharding can gather what it needs.
        model.hidden_states_of = MethodType(_hidden_states_of, model)  # type: ignore[assignment]
        # Without weights there is nothing to try.
        if self.model.device.type != "meta":
            self._probe(self.model.device)

    def to(self, device: torch.device) -> None:
        """Move the model there; of a sharded one what each rank has whole, since its shards have their place."""
        model: nn.Module = self.model
        if isinstance(model, FSDPModule):
            move_unsharded(model, device)
        else:
            model.to(device)
        if self._load_weights is not None:
            self._load_weights = None
            self._probe(device)

    def shard(self, shard: Callable[[nn.Module], Any], device: torch.device) -> None:
        """Spread the model over the ranks as the student is; one in 4 bits stays whole on each.

        Args:
            shard: Shards a causal language model in place, see :func:`~difftune.training.sharding.shard_model`.
            device: Where its shards lie; used where they are filled here.
        """
        if quantization_of(self.model) is None:
            shard(self.model)
            register_fsdp_forward_method(self.model, "hidden_states_of")
            if self._load_weights is not None:
                self._load_weights(self.model, device=device)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, torch.Tensor]) -> TeacherStates:
        """Its last hidden states at every position of a batch, shape ``(B, T, D)``, and its head."""
        names = ("input_ids", "position_ids", "attention_mask", *(("cu_seqlens",) if self._is_ours else ()))
        inputs = {name: batch[name] for name in names if name in batch}
        # Without a mask, transformers reads the borders of packed documents from positions that begin anew.
        hidden = self.model.hidden_states_of(**inputs)
        # After it: the head of a sharded model is whole from then on.
        return TeacherStates(hidden, self._head()[: self._vocab_size])

    @torch.no_grad()
    def score(
        self, documents: Sequence[torch.Tensor], learned: Sequence[torch.Tensor], k: int, temperature: float
    ) -> list[TopK]:
        """What it says to each label token of some documents, to be stored.

        Args:
            documents: Token ids of each, int64, shape ``(T,)``.
            learned: Which of them are labels, bool, shape ``(T,)``, the first False.
            k: How many tokens to keep; at most the student's vocabulary.
            temperature: By which its logits are divided.

        Returns:
            For each document one row a label token, in their order.
        """
        ids = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True).to(self.model.device)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(documents):
            mask[row, : len(document)] = 1
        hidden, weight = self({"input_ids": ids, "attention_mask": mask})
        found = []
        for row, labels in enumerate(learned):
            before = labels[1:].to(hidden.device).nonzero().squeeze(1)
            # A slice at a time: the logits of a long document would not fit.
            parts = [top_k(part, weight, k, temperature) for part in hidden[row, before].split(256)]
            found.append(TopK(*(torch.cat(part) for part in zip(*parts, strict=True))))
        return found

    def _head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def _probe(self, device: torch.device) -> None:
        """Refuse a model that this class would misread; of a sharded one, on all ranks."""
        vocabulary = self._head().shape[0]
        ids = torch.arange(sum(_PROBE_LENGTHS), device=device)[None] * 7 % vocabulary
        positions = torch.cat([torch.arange(length, device=device) for length in _PROBE_LENGTHS])[None]
        borders = torch.tensor([0, _PROBE_LENGTHS[0], sum(_PROBE_LENGTHS)], dtype=torch.int32, device=device)
        packed = self({"input_ids": ids, "position_ids": positions, "cu_seqlens": borders}).hidden
        alone = [self.model(input_ids=part).logits[0] for part in ids.split(_PROBE_LENGTHS, dim=1)]
        expected = torch.cat(alone).float()
        head = self._head()
        # Gathered weights may compute in another dtype than what comes out.
        actual = (packed[0].to(head.dtype) @ head.T).float()
        scale = expected.abs().max().clamp(min=1)
        # Two ways to compute the same in the model's own precision; what is looked for differs by much more.
        tolerance = 32 * torch.finfo(head.dtype).eps * scale * self.model.config.num_hidden_layers
        start = _PROBE_LENGTHS[0]
        name = self._name
        if not (actual[:start] - expected[:start]).abs().max() <= tolerance:
            raise ValueError(
                f"{name} cannot be a teacher: its logits are not its head applied to its last hidden states (scaled or "
                "capped logits, or a bias); choose a model of the Llama family"
            )
        if not (actual - expected).abs().max() <= tolerance:
            raise ValueError(
                f"{name} cannot be a teacher of packed rows: its documents see one another; set data.packing=false, or "
                "choose a model of the Llama family"
            )


def _hidden_states_of(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state
