"""The tasks of EleutherAI's lm-evaluation-harness on our models, through its own API.

An item is a task of the harness (or a group of them): its figures come out of `lm_eval.simple_evaluate` as they are.
What was interrupted within a task is not counted; its answers so far are kept, so that it goes on from there.

Source:
    github.com/EleutherAI/lm-evaluation-harness: the paper's zero-shot tables and its HellaSwag under quantisation.
"""

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.answer_cache import model_fingerprint
from difftune.evaluation.task import Clock, ItemTask, without_nan
from difftune.rendering import plain_ids, render_chat, text_ids

_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
PAPER = {
    name: {task: value for task, value in zip(_TASKS, values, strict=True) if value is not None}
    for name, values in {
        "DIFF 3B, 1T tokens": (37.8, 72.9, 69.0, 71.4, 29.0, 76.8, 67.1),
        "OpenLLaMA-3B-v2, 1T tokens": (33.9, 67.6, 65.7, 70.0, 26.0, 76.7, 62.9),
        "StableLM-base-alpha-3B-v2, 1T tokens": (32.4, 67.3, 64.6, 68.6, 26.4, 76.0, 62.1),
        "StableLM-3B-4E1T, 1T tokens": (None, 66.6, None, None, None, 76.8, 63.2),
        "DIFF 3B, 350B tokens": (33.0, 68.3, 60.1, 66.2, 27.6, 75.5, 62.7),
        "Transformer 3B, 350B tokens": (32.2, 66.8, 62.9, 63.4, 26.2, 74.5, 61.6),
        "DIFF 3B, 350B tokens, 5 shots": (35.0, 69.5, 67.2, 66.9, 27.6, 76.1, 63.8),
        "Transformer 3B, 350B tokens, 5 shots": (34.0, 69.5, 65.3, 63.4, 25.0, 75.2, 62.6),
    }.items()
}
"""Accuracy in per cent by model and task of the harness in the paper's Tables 1 and 8, zero-shot where not said. The
paper does not say which of the harness's metrics (acc, acc_norm) it is."""

INSTALL = "lm_eval tasks need the harness: pip install 'difftune[lm-eval]'"


@dataclass(frozen=True)
class HarnessSample:
    """What one task of the harness came to."""

    index: int
    """Place of the task in the list."""
    task: str
    """Its name in the harness."""
    figures: dict[str, float]
    """By `task_metric` (`task_metric_filter` where a filter was used), standard errors as `..._stderr`."""
    num_samples: int
    """Documents that were asked."""


@dataclass(frozen=True)
class HarnessResult:
    """The figures of all tasks."""

    samples: list[HarnessSample] = field(repr=False)
    """One a task of the harness."""
    num_items: int
    """How many there were to be."""

    @property
    def complete(self) -> bool:
        """Whether every task was run."""
        return len(self.samples) == self.num_items

    def metrics(self) -> dict[str, float]:
        """All figures."""
        return {name: value for sample in self.samples for name, value in sample.figures.items()}

    def __str__(self) -> str:
        """One line for the terminal."""
        shown = [f"{name} {value:.4f}" for name, value in self.metrics().items() if not name.endswith("_stderr")]
        return ", ".join(shown) or "not measured"

    def to_dict(self) -> dict[str, Any]:
        """The figures and counts, ready for JSON."""
        return without_nan({**self.metrics(), "n": sum(sample.num_samples for sample in self.samples)})

    def row(self) -> dict[str, str]:
        """How many tasks and documents."""
        return {
            "harness tasks": f"{len(self.samples)} of {self.num_items}",
            "n": str(sum(sample.num_samples for sample in self.samples)),
        }

    def tables(self) -> list[Table]:
        """Every figure with its standard error, and the paper's of the same tasks."""
        table = Table(title="lm-evaluation-harness", title_justify="left")
        for column in ("metric", "value", "standard error", "n"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for sample in self.samples:
            for name, value in sample.figures.items():
                if not name.endswith("_stderr"):
                    error = sample.figures.get(f"{name}_stderr", math.nan)
                    shown = "-" if math.isnan(error) else f"{error:.4f}"
                    table.add_row(name, f"{value:.4f}", shown, str(sample.num_samples))
        return [table, *self._paper()] if self.samples else []

    def _paper(self) -> list[Table]:
        known = [task for task in _TASKS if any(sample.task == task for sample in self.samples)]
        if not known:
            return []
        table = Table(title="accuracy in the paper, zero-shot where not said", title_justify="left")
        table.add_column("")
        for task in known:
            table.add_column(task, justify="right")
        for model, values in PAPER.items():
            if any(task in values for task in known):
                cells = (f"{values[task] / 100:.3f}" if task in values else "-" for task in known)
                table.add_row(f"paper: {model}", *cells, style="dim")
        return [table]


@dataclass
class HarnessTask(ItemTask[HarnessSample]):
    """Tasks of the harness, by name.

    Raises:
        ImportError: If the harness is not installed.
        ValueError: If no task is named, or the harness does not know one of them.
    """

    name: str
    """Names the task in metrics and samples."""
    tasks: Sequence[str]
    """Names of tasks or groups of the harness."""
    num_fewshot: int | None = None
    """Examples in front of each question. None: as the task says."""
    limit: int | None = None
    """Documents of each task, the first ones. None: all."""
    batch_size: int = 8
    """Requests run together."""
    max_length: int | None = None
    """Longest sequence in tokens. None: what the model is meant for."""
    apply_chat_template: bool = False
    """Ask through the tokenizer's chat template."""
    include_path: str | None = None
    """A folder with task definitions of one's own."""
    cache: Path | None = None
    """Folder for the answers of a task that is not finished. None: it begins anew."""

    kind: ClassVar[str] = "lm_eval"
    sample_type: ClassVar[type] = HarnessSample

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"task {self.name!r} names no task of the harness: lm_eval:hellaswag,arc_easy")
        if importlib.util.find_spec("lm_eval") is None:
            raise ImportError(INSTALL)
        self._manager = _task_manager(self.include_path, include_defaults=self.include_path is None)
        unknown = self._unknown()
        if unknown and self.include_path is not None:
            self._manager = _task_manager(self.include_path, include_defaults=True)
            unknown = self._unknown()
        if unknown:
            raise ValueError(
                f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm-eval ls tasks` shows all, and "
                "include_path names a folder with more"
            )

    def _unknown(self) -> list[str]:
        return [task for task in self.tasks if not self._manager.match_tasks([task])]

    @property
    def num_items(self) -> int:
        """The number of tasks of the harness."""
        return len(self.tasks)

    def blocks(self, indices: list[int]) -> list[list[int]]:
        """One task after the other, in the order given."""
        return [[index] for index in sorted(indices)]

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[HarnessSample]:
        """The figures of some tasks; none of one that the time did not allow."""
        samples = []
        for index in indices:
            try:
                samples.append(self._evaluate(model, tokenizer, index, clock))
            except _TimeIsOverError:
                break
        return samples

    def summarise(self, samples: Iterable[HarnessSample]) -> HarnessResult:
        """The figures of all parts together."""
        return HarnessResult(sorted(samples, key=lambda sample: sample.index), self.num_items)

    def _evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, index: int, clock: Clock
    ) -> HarnessSample:
        import lm_eval

        task = self.tasks[index]
        kept = None if self.cache is None else self.cache / f"{task}-{model_fingerprint(model)}"
        found = lm_eval.simple_evaluate(
            model=harness_model(model, tokenizer, clock, self.batch_size, self.max_length),
            tasks=[task],
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            log_samples=False,
            apply_chat_template=self.apply_chat_template,
            task_manager=self._manager,
            use_cache=None if kept is None else str(kept),
            # The random state belongs to whoever trains the model; examples in front have a seed of their own.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        assert found is not None, "only ranks above 0 get nothing, and the harness knows of one rank"
        figures = {
            named: float(value)
            for name, values in found["results"].items()
            for metric, value in values.items()
            if isinstance(value, int | float) and (named := figure_name(name, metric)) is not None
        }
        for file in [] if kept is None else kept.parent.glob(f"{kept.name}*"):
            file.unlink()
        counts = found.get("n-samples", {})
        return HarnessSample(index, task, figures, sum(count["effective"] for count in counts.values()))


@cache
def _task_manager(include_path: str | None, *, include_defaults: bool) -> Any:
    """The harness's index of tasks: its own, more than ten thousand files, only where they are needed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def figure_name(task: str, metric: str) -> str | None:
    """Our name for a figure of the harness; None for what is not a figure.

    Example:
        >>> figure_name("hellaswag", "acc_norm,none"), figure_name("gsm8k", "exact_match_stderr,strict-match")
        ('hellaswag_acc_norm', 'gsm8k_exact_match_strict-match_stderr')
    """
    name, comma, kind = metric.partition(",")
    if not comma:
        return None
    is_error = name.endswith("_stderr")
    parts = [task, name.removesuffix("_stderr")] + ([] if kind == "none" else [kind])
    return "_".join(parts + (["stderr"] if is_error else []))


def harness_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, clock: Clock, batch_size: int, max_length: int | None
) -> Any:
    """A model as the harness wants it; it stops with an error of ours when the time is over.

    Args:
        model: A causal language model of transformers' kind, on its device.
        tokenizer: Its tokenizer.
        clock: Asked before every forward.
        batch_size: Requests run together.
        max_length: Longest sequence in tokens. None: what the model is meant for.

    Returns:
        An instance of the harness's `HFLM`.
    """
    from lm_eval.models.huggingface import HFLM

    class Interruptible(HFLM):
        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            _check(clock)
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            _check(clock)
            return super()._model_generate(*args, **kwargs)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> Any:
            # As everywhere else a text begins once, and does not end: a chat's template has begun it already.
            begins = add_special_tokens is None and not string.startswith(tokenizer.bos_token or "\0")
            ids = text_ids(tokenizer, string) if begins else plain_ids(tokenizer, string)
            longest = kwargs.get("left_truncate_len") or (args[0] if args else None)
            return ids[-longest:] if longest else ids

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            options: dict[str, Any] = {} if add_generation_prompt else {"continue_final_message": True}
            return render_chat(tokenizer, chat_history, add_generation_prompt=add_generation_prompt, **options)

    return Interruptible(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        device=str(next(model.parameters()).device),
        batch_size=batch_size,
        max_length=max_length or getattr(model.config, "max_position_embeddings", None),
    )


class _TimeIsOverError(Exception):
    """Leaves the harness's loops."""


def _check(clock: Clock) -> None:
    if clock.is_over():
        raise _TimeIsOverError
