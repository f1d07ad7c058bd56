"""How much attention goes to the answer and how much to the noise around it, when a fact is asked for.

Each item is a context in which a fact stands, and a question about it. The query is the last token of the prompt, the
one that has to produce the first token of the answer. Keys fall into three groups: the tokens of the answer (`answer`),
those of the context but the sentence of the answer (`noise`), and the rest (sentence, question, chat markers). A head's
shares are

    share(group) = sum over the keys s of the group |A[s]|  /  sum over all s |A[s]|

with ``A = softmax(z)`` of a softmax head and ``A = A_1 - lambda A_2`` of a differential one: as the difference does not
sum to 1 and may be negative, the shares are of its magnitude. They are averaged over heads, then layers, then items.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, Table 3 (normalisation and averages are not stated there).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar, Protocol

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.attention_calls import AttentionCall, attention_calls
from difftune.evaluation.task import Clock, ItemTask, without_nan
from difftune.ops.reference import difference_map, reference_maps, reference_softmax_maps
from difftune.rendering import render_chat

PAPER = {
    "softmax": {"answer": (0.03, 0.03, 0.03, 0.07, 0.09), "noise": (0.51, 0.54, 0.52, 0.49, 0.49)},
    "diff_v1": {"answer": (0.27, 0.30, 0.31, 0.32, 0.40), "noise": (0.01, 0.02, 0.02, 0.02, 0.01)},
}
"""Table 3 of the paper, 3B models, at depths 0, 0.25, 0.5, 0.75, 1."""

PICTURE_SIZE = 64
"""Rows and columns of a map that is kept as a picture; a longer one is pooled to it."""


class Probe(Protocol):
    """A question about a fact in a context."""

    @property
    def context(self) -> str:
        """Text in which the fact stands."""

    @property
    def query(self) -> str:
        """The question."""

    @property
    def needle(self) -> str:
        """The fact, as it stands in the context, once."""

    @property
    def value(self) -> str:
        """The answer, as it stands in the fact."""

    @property
    def lead(self) -> str:
        """What the model is taken to have answered already, before the value."""

    @property
    def depth(self) -> float:
        """Where the fact stands, as a share of the context."""


@dataclass(frozen=True)
class NoiseSample:
    """Where the attention of one prompt went."""

    index: int
    """Place of the item."""
    depth: float
    """Of the fact."""
    num_tokens: int
    """Of the prompt."""
    answer: float
    """Share of the answer's tokens, averaged over heads and layers."""
    noise: float
    """Share of the rest of the context."""
    answer_by_layer: list[float]
    """Averaged over the heads of each layer."""
    noise_by_layer: list[float]
    """Averaged over the heads of each layer."""
    maps: dict[str, Any] | None = None
    """Of one head, for the items that are kept as pictures: `layer`, `head`, the maps as rows of numbers (`first`,
    and of a differential head `second`, `difference`, `lambda`), and the places of the answer in it (`answer`)."""


@dataclass(frozen=True)
class NoiseResult:
    """Attention to the answer and to the noise."""

    samples: list[NoiseSample] = field(repr=False)
    """Every prompt, in order."""
    num_items: int
    """How many there were to be."""

    @property
    def complete(self) -> bool:
        """Whether every prompt was measured."""
        return len(self.samples) == self.num_items

    @property
    def depths(self) -> list[float]:
        """The depths that were measured."""
        return sorted({sample.depth for sample in self.samples})

    def shares(self, depth: float | None = None) -> tuple[float, float]:
        """Mean share of the answer and of the noise, at one depth or over all prompts; NaN where there is none."""
        chosen = [sample for sample in self.samples if depth is None or sample.depth == depth]
        if not chosen:
            return float("nan"), float("nan")
        return fmean(sample.answer for sample in chosen), fmean(sample.noise for sample in chosen)

    def metrics(self) -> dict[str, float]:
        """`answer`, `noise`, `signal_to_noise`; `answer_depth_025` and `answer_layer_00` and so on, noise alike."""
        answer, noise = self.shares()
        values = {"answer": answer, "noise": noise, "signal_to_noise": _ratio(answer, noise)}
        for depth in self.depths:
            at = f"{round(100 * depth):03d}"
            values[f"answer_depth_{at}"], values[f"noise_depth_{at}"] = self.shares(depth)
        for name in ("answer", "noise"):
            columns = zip(*(getattr(sample, f"{name}_by_layer") for sample in self.samples), strict=True)
            values |= {f"{name}_layer_{layer:02d}": fmean(column) for layer, column in enumerate(columns)}
        return values

    def __str__(self) -> str:
        """One line for the terminal."""
        answer, noise = self.shares()
        return f"attention to the answer {answer:.3f}, to the noise {noise:.3f}, on {len(self.samples)} prompts"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, and the maps of the first picture, ready for JSON."""
        maps = next((sample.maps for sample in self.samples if sample.maps), None)
        return {**without_nan(self.metrics()), "n": len(self.samples), "maps": maps}

    def row(self) -> dict[str, str]:
        """The figures as text, by column."""
        answer, noise = self.shares()
        return {
            "answer": f"{answer:.3f}",
            "noise": f"{noise:.3f}",
            "signal to noise": f"{_ratio(answer, noise):.3g}",
            "n": str(len(self.samples)),
        }

    def tables(self) -> list[Table]:
        """Shares by depth, with the paper's beneath."""
        if not self.samples:
            return []
        table = Table(title="attention by depth of the answer", title_justify="left")
        for column in ("to", *(f"{depth:.0%}" for depth in self.depths)):
            table.add_column(column, justify="left" if column == "to" else "right")
        for row, name in enumerate(("answer", "noise")):
            table.add_row(name, *(f"{self.shares(depth)[row]:.3f}" for depth in self.depths))
        if self.depths == [0, 0.25, 0.5, 0.75, 1]:
            for kind, title in (("diff_v1", "DIFF 3B"), ("softmax", "Transformer 3B")):
                for name, values in PAPER[kind].items():
                    table.add_row(f"paper: {title}, {name}", *(f"{value:.2f}" for value in values), style="dim")
        return [table]


@dataclass
class NoiseTask(ItemTask[NoiseSample]):
    """Prompts with a known answer span.

    Raises:
        ValueError: If there is none.
    """

    name: str
    """Names the task in metrics and samples."""
    probes: Sequence[Probe]
    """The prompts."""
    layer: int = -1
    """Layer of the head that is kept as a picture; negative: from the last."""
    head: int = 0
    """That head."""
    pictures: int = 1
    """Of so many items, the first ones."""

    kind: ClassVar[str] = "attention_noise"
    sample_type: ClassVar[type] = NoiseSample

    def __post_init__(self) -> None:
        if not self.probes:
            raise ValueError(f"evaluation task {self.name!r} has no prompt")

    @property
    def num_items(self) -> int:
        """The number of prompts."""
        return len(self.probes)

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[NoiseSample]:
        """Where the attention of the prompts goes."""
        return [self._measure(model, tokenizer, index) for index in indices]

    def summarise(self, samples: Iterable[NoiseSample]) -> NoiseResult:
        """Means over the samples of all parts."""
        return NoiseResult(sorted(samples, key=lambda sample: sample.index), self.num_items)

    def _measure(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, index: int) -> NoiseSample:
        tokens, answer, noise = locate(tokenizer, self.probes[index])
        device = next(model.parameters()).device
        groups = torch.stack([answer, noise]).to(device)
        shares: list[torch.Tensor] = []
        pictures: list[dict[str, Any] | None] = []

        def look(call: AttentionCall) -> None:
            shares.append(group_shares(last_row(call), groups).mean(dim=0))
            pictures.append(picture(call, self.head) if index < self.pictures else None)

        with attention_calls(model, look):
            model(torch.tensor([tokens], device=device), use_cache=False, logits_to_keep=1)
        if not -len(shares) <= self.layer < len(shares):
            raise ValueError(f"layer of task {self.name!r} must be one of the model's {len(shares)}, got {self.layer}")
        kept = pictures[self.layer]
        by_layer = torch.stack(shares)
        return NoiseSample(
            index=index,
            depth=self.probes[index].depth,
            num_tokens=len(tokens),
            answer=by_layer[:, 0].mean().item(),
            noise=by_layer[:, 1].mean().item(),
            answer_by_layer=by_layer[:, 0].tolist(),
            noise_by_layer=by_layer[:, 1].tolist(),
            maps=None if kept is None else {**kept, "answer": _pooled_places(answer)},
        )


def locate(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The prompt as tokens, and which of them are the answer and which the noise.

    Args:
        tokenizer: With a chat template, and able to tell which characters a token stands for.
        probe: Context, question and answer.

    Returns:
        Token ids, and two bool tensors of shape ``(S,)``.

    Raises:
        ValueError: If the fact does not stand in the context once, or the tokenizer cannot tell.
    """
    if probe.context.count(probe.needle) != 1 or probe.needle.count(probe.value) != 1:
        raise ValueError(f"{probe.needle!r} with {probe.value!r} must stand in the context exactly once")
    if not tokenizer.is_fast:
        raise ValueError("attention_noise needs a fast tokenizer (tokenizer.json)")
    messages = [{"role": "user", "content": f"{probe.context}\n{probe.query}"}]
    text = render_chat(tokenizer, messages, add_generation_prompt=True) + probe.lead
    if text.count(probe.context) != 1:
        raise ValueError("the chat template changes the text that attention_noise asks about: give it another template")
    begin = text.index(probe.context)
    needle = begin + probe.context.index(probe.needle)
    value = needle + probe.needle.index(probe.value)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    def covered(start: int, length: int) -> torch.Tensor:
        # A token of no character, as some tokenizers have, belongs to nothing.
        return torch.tensor([low < start + length and high > start and high > low for low, high in offsets])

    offsets = encoded["offset_mapping"]
    noise = covered(begin, len(probe.context)) & ~covered(needle, len(probe.needle))
    return encoded["input_ids"], covered(value, len(probe.value)), noise


def last_row(call: AttentionCall) -> torch.Tensor:
    """The attention of the last query of a call's only row, shape ``(heads, S)``: the difference, or the map."""
    q = call.q[:, -1:]
    if call.lam is None:
        return reference_softmax_maps(q, call.k)[0, :, 0]
    lam = call.lam[:, -1:] if call.lam.ndim == 3 else call.lam
    return difference_map(*reference_maps(q, call.k), lam)[0, :, 0]


def group_shares(attention: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Share of the attention's magnitude that goes to each group of keys.

    Args:
        attention: ``(heads, S)``.
        groups: Bool, ``(groups, S)``.

    Returns:
        ``(heads, groups)``, in 0..1.

    Example:
        >>> group_shares(torch.tensor([[0.6, -0.2, 0.2]]), torch.tensor([[True, False, False], [False, True, False]]))
        tensor([[0.6000, 0.2000]])
    """
    magnitude = attention.abs().float()
    return magnitude @ groups.float().T / magnitude.sum(dim=-1, keepdim=True)


def picture(call: AttentionCall, head: int) -> dict[str, Any]:
    """The maps of one head of a call's only row, pooled to `PICTURE_SIZE`."""
    heads = call.q.shape[2]
    if not 0 <= head < heads:
        raise ValueError(f"head of attention_noise must be 0 to {heads - 1}, got {head}")
    group = head // (heads // call.k.shape[2])
    q, k = call.q[:, :, head : head + 1], call.k[:, :, group : group + 1]
    where = {"layer": call.layer, "head": head}
    if call.lam is None:
        return {**where, "first": _pooled(reference_softmax_maps(q, k)[0, 0])}
    lam = call.lam if call.lam.ndim == 0 else call.lam[..., head : head + 1]
    first, second = reference_maps(q, k)
    return {
        **where,
        "lambda": lam.float().mean().item(),
        "first": _pooled(first[0, 0]),
        "second": _pooled(second[0, 0]),
        "difference": _pooled(difference_map(first, second, lam)[0, 0]),
    }


def _pooled(one: torch.Tensor) -> list[list[float]]:
    """A map at most `PICTURE_SIZE` wide: of each square, what is largest in magnitude."""
    size = min(PICTURE_SIZE, one.shape[-1])
    high = nn.functional.adaptive_max_pool2d(one[None].float(), size)[0]
    low = -nn.functional.adaptive_max_pool2d(-one[None].float(), size)[0]
    largest = torch.where(high.abs() >= low.abs(), high, low)
    return [[round(value, 4) for value in row] for row in largest.tolist()]


def _pooled_places(answer: torch.Tensor) -> list[int]:
    """Columns of the pooled map in which tokens of the answer lie."""
    size = min(PICTURE_SIZE, len(answer))
    return nn.functional.adaptive_max_pool1d(answer.float()[None], size)[0].nonzero().flatten().tolist()


def _ratio(answer: float, noise: float) -> float:
    return answer / noise if noise else float("nan")
