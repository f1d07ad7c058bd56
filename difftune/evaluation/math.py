"""Accuracy on problems with a known final answer: generate, find the answer, grade, and say how sure the figure is."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, ClassVar, Protocol

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.generation import generate_texts
from difftune.evaluation.grading import VERDICTS, Grader
from difftune.evaluation.intervals import wilson_interval
from difftune.evaluation.prompts import PROMPTS, build_prompt, stop_strings
from difftune.evaluation.task import Clock, ItemTask, mean, share, without_nan

_BATCHES_A_BLOCK = 8

_SETS = ("gsm8k", "math", "svamp", "asdiv", "mawps", "carp", "tabmwp", "college_math")
PAPER = {
    "diff_v1": dict(zip(_SETS, (0.426, 0.250, 0.637, 0.838, 0.862, 0.425, 0.324, 0.300), strict=True)),
    "softmax": dict(zip(_SETS, (0.412, 0.199, 0.550, 0.788, 0.751, 0.323, 0.275, 0.164), strict=True)),
}
"""Accuracy by set after the second stage in the paper's Fig. 10, 3B models, 16K tokens of output."""


class Problem(Protocol):
    """What is asked of a problem, whoever made it."""

    @property
    def id(self) -> str:
        """Unique in its set."""

    @property
    def question(self) -> str:
        """The question as text."""

    @property
    def answer(self) -> str:
        """The gold final answer."""

    @property
    def prompt_messages(self) -> Sequence[Any]:
        """The chat before the answer: mappings with `role` and `content`."""


@dataclass(frozen=True)
class Sample:
    """One answer to one problem, as it is written to `samples/`."""

    index: int
    """Place of the problem in its set."""
    id: str
    """Of the problem."""
    question: str
    """Of the problem."""
    gold: str
    """Its right answer."""
    text: str
    """What the model wrote."""
    answer: str | None
    """The final answer found in it."""
    verdict: str
    """How it was graded: one of `grading.VERDICTS`."""
    num_tokens: int
    """Length of the text in tokens."""
    finished: bool
    """The model ended the text itself; if it did not, it was cut at `max_new_tokens`."""


@dataclass(frozen=True)
class MathResult:
    """Figures of one evaluation. Rates are shares of the answers, in 0..1; NaN where there is none."""

    accuracy: float
    """Share of right answers; with several answers a problem, the mean over the problems of theirs."""
    interval: tuple[float, float]
    """95% Wilson interval of the accuracy, for `n` independent problems whatever the answers a problem."""
    n: int
    """Problems that were graded."""
    skipped: int
    """Problems that were not reached because the time was over."""
    truncated: float
    """Share of answers cut at `max_new_tokens`."""
    unparsed: float
    """Share of answers in which no final answer was found."""
    mean_length: float
    """Mean length of the answers, in tokens."""
    verdicts: dict[str, int]
    """Answers by verdict."""
    samples: list[Sample] = field(repr=False)
    """Every answer, in the order of the problems."""
    name: str = field(default="", compare=False)
    """Of the set."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows of the set's file that are no problems, by the reason."""

    @property
    def complete(self) -> bool:
        """Whether every problem was graded."""
        return self.skipped == 0

    def metrics(self) -> dict[str, float]:
        """The figures that are logged, by name."""
        return {
            "accuracy": self.accuracy,
            "accuracy_low": self.interval[0],
            "accuracy_high": self.interval[1],
            "truncated": self.truncated,
            "unparsed": self.unparsed,
            "mean_length": self.mean_length,
            "n": float(self.n),
        }

    def __str__(self) -> str:
        """One line for the terminal."""
        low, high = self.interval
        parts = [f"accuracy {self.accuracy:.3f} ({low:.3f} to {high:.3f}) on {self.n} problems"]
        parts += [f"{self.truncated:.1%} truncated"] if self.truncated else []
        parts += [f"{self.unparsed:.1%} without an answer"] if self.unparsed else []
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        parts += [f"{sum(self.dropped.values())} rows of the file are no problems ({reasons})"] if reasons else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON: None stands for NaN."""
        names = ("accuracy", "interval", "n", "skipped", "truncated", "unparsed", "mean_length", "verdicts", "dropped")
        values = {name: getattr(self, name) for name in names}
        values["interval"] = list(self.interval)
        return without_nan(values)

    def row(self) -> dict[str, str]:
        """The figures as text, by column; the paper's for a set that it has."""
        low, high = self.interval
        known = [figures[self.name] for figures in PAPER.values() if self.name in figures]
        paper = {"paper: DIFF, Transformer 3B": ", ".join(map(share, known))} if known else {}
        return {
            "accuracy": share(self.accuracy),
            "95% interval": f"{low:.3f} to {high:.3f}",
            "n": str(self.n),
            "truncated": f"{self.truncated:.1%}",
            "unparsed": f"{self.unparsed:.1%}",
            "mean tokens": f"{self.mean_length:.0f}",
            **paper,
        }

    def tables(self) -> list[Table]:
        """None: the row says it all."""
        return []


@dataclass
class MathTask(ItemTask[Sample]):
    """A set of problems and how they are to be answered.

    Raises:
        ValueError: If there is no problem, or if several greedy answers are asked for, which would all be the same.
    """

    name: str
    """Names the task in metrics and samples."""
    problems: Sequence[Problem]
    """The set."""
    max_new_tokens: int
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Prompts decoded together."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share of the probability."""
    num_samples: int = 1
    """Answers a problem (avg@k)."""
    seed: int = 0
    """Of the samples."""
    prompt: str = "chat"
    """How the problems are put; one of `difftune.evaluation.prompts.PROMPTS`."""
    demonstrations: Sequence[tuple[str, str]] = ()
    """Questions and answers before every problem (n-shot)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows of the set's file that are no problems, by the reason; shown with the figures."""
    grader: Grader = field(default_factory=Grader)
    """Kept from one run to the next, as its process takes half a second to start."""

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError(f"evaluation task {self.name!r} has no problem")
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt of task {self.name!r} must be one of {', '.join(PROMPTS)}, got {self.prompt!r}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples of task {self.name!r} must be at least 1, got {self.num_samples}")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} of task {self.name!r} needs temperature > 0: "
                "greedy answers are all the same"
            )

    kind: ClassVar[str] = "math"
    sample_type: ClassVar[type] = Sample

    @property
    def num_items(self) -> int:
        """The number of problems."""
        return len(self.problems)

    def blocks(self, indices: list[int]) -> list[list[int]]:
        """Eight batches a block, of problems drawn at random: inside a block, prompts of similar length meet."""
        order = sorted(indices)
        random.Random(self.seed).shuffle(order)
        size = max(1, _BATCHES_A_BLOCK * self.batch_size // self.num_samples)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[Sample]:
        """Answer problems and grade the answers.

        Returns:
            `num_samples` samples a problem, in the order of the set; none of a problem that the time did not allow.

        Raises:
            ValueError: If the tokenizer has no chat template or cannot encode a prompt.
        """
        repeated = [index for index in sorted(indices) for _ in range(self.num_samples)]
        prompts = {index: self._prompt(tokenizer, self.problems[index]) for index in indices}
        generations = generate_texts(
            model,
            tokenizer,
            [prompts[index] for index in repeated],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            # The same whatever the blocks, and so the number of ranks.
            numbers=[place * self.num_samples + k for place in sorted(indices) for k in range(self.num_samples)],
            stop=stop_strings(self.prompt) or None,
            should_stop=clock.is_over,
        )
        cut = {index for index, text in zip(repeated, generations, strict=True) if text.interrupted}
        done = [pair for pair in zip(repeated, generations, strict=True) if pair[0] not in cut]
        grades = self.grader.grade_all((text.text, self.problems[index].answer) for index, text in done)
        return [
            Sample(
                index=index,
                id=self.problems[index].id,
                question=self.problems[index].question,
                gold=self.problems[index].answer,
                text=text.text,
                answer=grade.answer,
                verdict=grade.verdict,
                num_tokens=text.num_tokens,
                finished=text.finished,
            )
            for (index, text), grade in zip(done, grades, strict=True)
        ]

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        what = f"problem {problem.id}"
        return build_prompt(self.prompt, tokenizer, problem.prompt_messages, self.demonstrations, what)

    def summarise(self, samples: Iterable[Sample]) -> MathResult:
        """Figures of the samples, of all parts together."""
        return replace(summarise(samples, self.num_items, self.name), dropped=self.dropped)

    def close(self) -> None:
        """End the grading process."""
        self.grader.close()


def evaluate_math(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    should_stop: Callable[[], bool] | None = None,
    deadline: float | None = None,
) -> MathResult:
    """Accuracy of a model on problems.

    Args:
        model: A causal language model of transformers' kind; mode and random state are left as they are.
        tokenizer: With an end-of-text token and a chat template.
        problems: With `id`, `question`, `answer` and `prompt_messages`.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts decoded together.
        temperature: 0 is greedy.
        top_p: Sample from the most likely tokens that hold this share of the probability.
        num_samples: Answers a problem; needs `temperature` > 0.
        seed: Of the samples.
        should_stop: Polled at every token; True ends the work.
        deadline: A value of `time.monotonic()` that ends the work.

    Returns:
        The result; partial (`complete` is False) where the work was ended early.

    Raises:
        ValueError: If a setting is out of range, there is no problem, or a prompt cannot be built.
    """
    task = MathTask("problems", problems, max_new_tokens, batch_size, temperature, top_p, num_samples, seed)
    try:
        return task.summarise(task.run(model, tokenizer, should_stop=should_stop, deadline=deadline))
    finally:
        task.close()


def summarise(samples: Iterable[Sample], num_problems: int, name: str = "") -> MathResult:
    """Figures of graded samples of some of so many problems of a set."""
    done = sorted(samples, key=lambda sample: sample.index)
    right_by_problem: dict[int, list[bool]] = {}
    for sample in done:
        right_by_problem.setdefault(sample.index, []).append(sample.verdict == "correct")
    accuracy = mean([fmean(right) for right in right_by_problem.values()])
    counts = Counter(sample.verdict for sample in done)
    return MathResult(
        accuracy=accuracy,
        interval=wilson_interval(accuracy, len(right_by_problem)),
        n=len(right_by_problem),
        skipped=num_problems - len(right_by_problem),
        truncated=mean([not sample.finished for sample in done]),
        unparsed=mean([sample.verdict == "unparsed" for sample in done]),
        mean_length=mean([sample.num_tokens for sample in done]),
        verdicts={verdict: counts[verdict] for verdict in VERDICTS},
        samples=done,
        name=name,
    )
