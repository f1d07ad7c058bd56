"""Outliers: the largest magnitudes, and the median, of attention logits and hidden states.

Everything is streamed: no logit outlives its layer (`difftune.evaluation.magnitudes` says how the figures are exact
nevertheless, for which the texts go through the model twice). The logits are those before the softmax, scaled, of the
keys that a query may see; a differential head has two maps, and so twice the logits of a softmax head. Hidden states
are the outputs of the layers, before the final norm.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, Table 5 (0.4M tokens; which tokens is not stated).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.attention_calls import attention_calls
from difftune.evaluation.magnitudes import Magnitudes
from difftune.evaluation.task import Clock, ItemTask, without_nan
from difftune.evaluation.tokens import token_rows
from difftune.modeling.modeling import DecoderLayer

_RANKS = ("top_1", "top_2", "top_3", "top_10", "top_100", "median")
PAPER = {
    "softmax": {
        "logits": dict(zip(_RANKS, (318.0, 308.2, 304.9, 284.7, 251.5, 5.4), strict=True)),
        "hidden": dict(zip(_RANKS, (3608.6, 3607.4, 3603.6, 3552.1, 2448.2, 0.6), strict=True)),
    },
    "diff_v1": {
        "logits": dict(zip(_RANKS, (38.8, 38.8, 37.3, 32.0, 27.4, 3.3), strict=True)),
        "hidden": dict(zip(_RANKS, (1688.2, 1672.5, 1672.1, 1624.3, 740.9, 1.2), strict=True)),
    },
}
"""Table 5 of the paper, 3B models."""


@dataclass(frozen=True)
class ActivationsSample:
    """The figures of the whole text."""

    index: int
    """0: the figures of all tokens together are one item."""
    num_tokens: int
    """Tokens that went through the model."""
    logits: dict[str, float]
    """`top_1` to `top_100` and `median` of the attention logits' magnitudes."""
    hidden: dict[str, float]
    """The same of the hidden states'."""
    logits_by_layer: list[dict[str, float]]
    """Of each layer."""
    hidden_by_layer: list[dict[str, float]]
    """Of each layer."""


@dataclass(frozen=True)
class ActivationsResult:
    """Outliers of a model; empty where the time was over before the end."""

    samples: list[ActivationsSample] = field(repr=False)
    """One, or none."""

    @property
    def complete(self) -> bool:
        """Whether all tokens were seen."""
        return bool(self.samples)

    def metrics(self) -> dict[str, float]:
        """`logits_top_1`, ..., `hidden_median`, and by layer `logits_top_1_layer_00`."""
        values: dict[str, float] = {}
        for sample in self.samples:
            for kind in ("logits", "hidden"):
                values |= {f"{kind}_{name}": value for name, value in getattr(sample, kind).items()}
                for layer, figures in enumerate(getattr(sample, f"{kind}_by_layer")):
                    values[f"{kind}_top_1_layer_{layer:02d}"] = figures["top_1"]
        return values

    def __str__(self) -> str:
        """One line for the terminal."""
        if not self.samples:
            return "not measured: the time was over"
        sample = self.samples[0]
        parts = [
            f"{what} up to {figures['top_1']:.1f} (median {figures['median']:.2f})"
            for what, figures in (("logits", sample.logits), ("hidden states", sample.hidden))
        ]
        return ", ".join(parts) + f" on {sample.num_tokens:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return without_nan(dict(vars(self.samples[0]))) if self.samples else {}

    def row(self) -> dict[str, str]:
        """The figures as text, by column."""
        figures = self.samples[0] if self.samples else None
        return {
            "tokens": f"{figures.num_tokens:,}" if figures else "-",
            "largest logit": f"{figures.logits['top_1']:.1f}" if figures else "-",
            "median": f"{figures.logits['median']:.2f}" if figures else "-",
            "largest hidden state": f"{figures.hidden['top_1']:.1f}" if figures else "-",
            "median ": f"{figures.hidden['median']:.2f}" if figures else "-",
        }

    def tables(self) -> list[Table]:
        """A table of all ranks, with the paper's beneath; and one by layer."""
        return [table for sample in self.samples for table in (_overall_table(sample), _layer_table(sample))]


@dataclass
class ActivationsTask(ItemTask[ActivationsSample]):
    """Text to look for outliers on.

    Raises:
        ValueError: If there is no text.
    """

    name: str
    """Names the task in metrics and samples."""
    documents: Sequence[Any]
    """Texts, or chats as lists of messages."""
    num_tokens: int = 400_000
    """At most so many tokens, from the first document on."""
    length: int | None = None
    """Tokens of a forward. None: as the model is meant for, at most 4096."""

    kind: ClassVar[str] = "activations"
    sample_type: ClassVar[type] = ActivationsSample

    def __post_init__(self) -> None:
        if not self.documents:
            raise ValueError(f"evaluation task {self.name!r} has no text")

    @property
    def num_items(self) -> int:
        """One: the order statistics of the whole."""
        return 1

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[ActivationsSample]:
        """The figures of all tokens; nothing where the time did not allow both passes."""
        length = self.length or min(4096, getattr(model.config, "max_position_embeddings", 4096))
        rows = token_rows(tokenizer, self.documents, length=length, num_tokens=self.num_tokens)
        sample = measure_activations(model, rows, should_stop=clock.is_over)
        return [] if sample is None else [sample]

    def summarise(self, samples: Iterable[ActivationsSample]) -> ActivationsResult:
        """The one sample as a result."""
        return ActivationsResult(list(samples))


def measure_activations(
    model: nn.Module, rows: Sequence[Sequence[int]], *, should_stop: Callable[[], bool] = lambda: False
) -> ActivationsSample | None:
    """Largest magnitudes and medians over rows of tokens.

    Args:
        model: Of ours, or with ours inside.
        rows: Token ids; a forward each.
        should_stop: Polled before each forward.

    Returns:
        The figures, or None where `should_stop` said so.

    Raises:
        ValueError: If the model has no attention of ours.
        RuntimeError: If two forwards of the same tokens differ.
    """
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    logits, hidden = ([Magnitudes() for _ in range(len(layers) + 1)] for _ in range(2))
    device = next(model.parameters()).device
    for second_pass in (False, True):
        if second_pass:
            for statistics in (*logits, *hidden):
                statistics.end_first_pass()
        with _watched(model, layers, logits, hidden, second_pass):
            for row in rows:
                if should_stop():
                    return None
                model(torch.tensor([list(row)], device=device), use_cache=False, logits_to_keep=1)
    *logits_by_layer, all_logits = [statistics.figures() for statistics in logits]
    *hidden_by_layer, all_hidden = [statistics.figures() for statistics in hidden]
    return ActivationsSample(0, sum(map(len, rows)), all_logits, all_hidden, logits_by_layer, hidden_by_layer)


@contextmanager
def _watched(
    model: nn.Module,
    layers: list[DecoderLayer],
    logits: list[Magnitudes],
    hidden: list[Magnitudes],
    second_pass: bool,
) -> Iterator[None]:
    """Feed the statistics, of each layer and, at the end of the lists, of all layers, while a model runs."""

    def feed(statistics: list[Magnitudes], layer: int, values: torch.Tensor) -> None:
        for one in (statistics[layer], statistics[-1]):
            if second_pass:
                one.add_again(values)
            else:
                one.add(values)

    def look(call: Any) -> None:
        for values in call.logits():
            feed(logits, call.layer, values)

    def listener(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: feed(hidden, layer, output)

    hooks = [module.register_forward_hook(listener(layer)) for layer, module in enumerate(layers)]
    try:
        with attention_calls(model, look):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _overall_table(sample: ActivationsSample) -> Table:
    title = f"magnitudes over {sample.num_tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    names = list(sample.logits)
    for column in ("", *(name.replace("_", " ") for name in names)):
        table.add_column(column, justify="right" if column else "left")
    for title, figures in (("attention logits", sample.logits), ("hidden states", sample.hidden)):
        table.add_row(title, *(f"{figures.get(name, float('nan')):.2f}" for name in names))
    for kind, title in (("diff_v1", "DIFF 3B"), ("softmax", "Transformer 3B")):
        for what in ("logits", "hidden"):
            table.add_row(f"paper: {title}, {what}", *(f"{PAPER[kind][what][name]:.1f}" for name in names), style="dim")
    return table


def _layer_table(sample: ActivationsSample) -> Table:
    table = Table(title="by layer: largest, median", title_justify="left")
    for column in ("layer", "logits", "median", "hidden states", "median "):
        table.add_column(column, justify="right")
    for layer, (logits, hidden) in enumerate(zip(sample.logits_by_layer, sample.hidden_by_layer, strict=True)):
        values = (logits["top_1"], logits["median"], hidden["top_1"], hidden["median"])
        table.add_row(str(layer), *(f"{value:.2f}" for value in values))
    return table
