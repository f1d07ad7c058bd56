"""Two checkpoints on the same tokens, each run layer by layer from its files: how far their logits are apart.

A model is built without weights; each layer reads its own when its turn comes and gives them back. So the check of a
7B conversion in float32 needs the memory of one layer, embedding and head, and it reads what was really written.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from difftune.checkpoints.streams import EMBEDDING, HEAD, NORM, TensorStream, by_unit

# Largest accepted difference of two logits, as a share of the largest logit (at least 1): float32 rounding through the
# layers stays well below, a wrong permutation is orders of magnitude above.
RELATIVE_BUDGET = 2e-5
_CHUNK = 128  # positions whose logits are held at a time


@dataclass(frozen=True)
class Difference:
    """How two models differ on some tokens."""

    inputs: str
    """What the tokens are."""
    tokens: int
    """How many positions were compared."""
    max_abs_logit: float
    """Largest difference of two logits."""
    logit_scale: float
    """Largest absolute logit of the source."""
    kl: float
    """Mean KL divergence of the target's next-token distribution from the source's, nats a token."""
    same_top: float
    """Share of positions with the same most probable token."""
    nll_before: float
    """Mean negative log-likelihood of the source, nats a token."""
    nll_after: float
    """The same of the target."""

    @property
    def budget(self) -> float:
        """What ``max_abs_logit`` has to stay within where the conversion is exact."""
        return RELATIVE_BUDGET * max(1.0, self.logit_scale)

    @property
    def within_budget(self) -> bool:
        """Whether it does; false for NaN."""
        return math.isfinite(self.max_abs_logit) and self.max_abs_logit <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """All figures, for conversion.json."""
        return {**asdict(self), "budget": self.budget}


@dataclass
class StreamedModel:
    """A causal language model whose weights come one layer at a time.

    Args:
        model_class: Of transformers, or ours.
        config: Of the model.
        tensors: Its tensors in order; used up by the run.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: TensorStream

    @torch.no_grad()
    def run(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states after the final norm, ``(B, T, C)``, and the weight of the head, ``(V, C)``.

        The states in float32, or in float64 if the weights are stored so; the head as it is stored.
        """
        with torch.device("meta"):
            model: Any = self.model_class(self.config)
        body = model.model
        body.rotary_emb = type(body.rotary_emb)(config=self.config)  # its frequencies are no weights: built for real
        model.eval()
        units = by_unit(self.tensors)
        kept: dict[str, torch.Tensor] = {}
        dtype = torch.float32

        def take(unit: str) -> dict[str, torch.Tensor]:
            found, items = next(units)
            assert found == unit, f"the stream gives {found} where {unit} is due"
            return items

        def load(module: nn.Module, unit: str) -> None:
            nonlocal dtype
            items = take(unit)
            if unit == EMBEDDING:
                dtype = torch.promote_types(items[unit].dtype, torch.float32)
                if self.config.tie_word_embeddings:
                    kept[HEAD] = items[unit]
            prefix = unit.removesuffix("weight")
            # Popped, so that a layer is not held in both dtypes.
            state = {name.removeprefix(prefix): items.pop(name).to(dtype) for name in list(items)}
            module.load_state_dict(state, assign=True)

        parts = [(body.embed_tokens, EMBEDDING), (body.norm, NORM)]
        parts += [(layer, f"model.layers.{i}.") for i, layer in enumerate(body.layers)]
        for module, unit in parts:
            module.register_forward_pre_hook(lambda module, _, unit=unit: load(module, unit))
            module.register_forward_hook(_give_back)
        hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
        head = kept[HEAD] if self.config.tie_word_embeddings else take(HEAD)[HEAD]
        return hidden, head


def _give_back(module: nn.Module, _inputs: Any, _output: Any) -> None:
    module.to_empty(device="meta")


def compare(source: StreamedModel, target: StreamedModel, rows: dict[str, list[list[int]]]) -> list[Difference]:
    """Run two models on the same tokens and measure how far apart they are.

    Args:
        source: What was converted.
        target: What it became, as it is on disk.
        rows: Token ids by what they are; each row is a text of its own.

    Returns:
        One difference for each kind of rows.
    """
    flat = [(kind, row) for kind, kind_rows in rows.items() for row in kind_rows]
    longest = max(len(row) for _, row in flat)
    # Padding stands on the right, where the causal mask hides it.
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for _, row in flat])
    before, head_before = source.run(input_ids)
    after, head_after = target.run(input_ids)
    dtype = torch.promote_types(before.dtype, after.dtype)
    same_head = head_before.dtype == head_after.dtype and torch.equal(head_before, head_after)
    head_before = head_before.to(dtype)
    head_after = head_before if same_head else head_after.to(dtype)
    before, after = before.to(dtype), after.to(dtype)
    differences = []
    for kind in rows:
        members = [(i, len(row)) for i, (own, row) in enumerate(flat) if own == kind]
        differences.append(_measure(kind, input_ids, members, (before, head_before), (after, head_after)))
    return differences


def _measure(
    kind: str,
    input_ids: torch.Tensor,
    members: list[tuple[int, int]],
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
) -> Difference:
    worst = scale = kl = top = nll_before = nll_after = 0.0
    tokens = labels = 0
    for row, length in members:
        for start in range(0, length, _CHUNK):
            at = slice(start, min(start + _CHUNK, length))
            old, new = (hidden[row, at] @ head.T for hidden, head in (before, after))
            found = (new - old).abs().max().item()
            if not found <= worst and not math.isnan(worst):  # once NaN, it stays
                worst = found
            scale = max(scale, old.abs().max().item())
            old_log, new_log = old.log_softmax(-1), new.log_softmax(-1)
            kl += (old_log.exp() * (old_log - new_log)).sum().item()
            top += (old.argmax(-1) == new.argmax(-1)).sum().item()
            tokens += len(old)
            follows = input_ids[row, at.start + 1 : min(at.stop + 1, length), None]
            nll_before -= old_log[: len(follows)].gather(-1, follows).sum().item()
            nll_after -= new_log[: len(follows)].gather(-1, follows).sum().item()
            labels += len(follows)
    labels = max(labels, 1)
    return Difference(
        inputs=kind,
        tokens=tokens,
        max_abs_logit=worst,
        logit_scale=scale,
        kl=max(kl / tokens, 0.0),  # rounding can bring it below
        same_top=top / tokens,
        nll_before=nll_before / labels,
        nll_after=nll_after / labels,
    )


def probe_rows(vocab_size: int, max_position_embeddings: int) -> list[list[int]]:
    """Two rows of random tokens, the same for the same vocabulary."""
    length = min(64, max_position_embeddings)
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0)).tolist()


def text_rows(ids: list[int], max_position_embeddings: int, limit: int) -> Iterator[list[int]]:
    """The first ``limit`` tokens of a text in rows of at most 512, the last one shorter."""
    length = min(512, max_position_embeddings)
    for start in range(0, min(limit, len(ids)), length):
        yield ids[start : min(start + length, limit)]
