"""Hallucination in summaries and answers: does the model say only what the document says?

A model summarises documents, or answers questions about them; a judge (`difftune.evaluation.judges`) says whether all
of it can be inferred from the document. Accuracy is the share of texts free of hallucination.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, section 3.6: XSum, CNN/DM, MultiNews; Qasper, HotpotQA and
    2WikiMQA of LongBench; 100 samples a set, judged by GPT-4o.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.answer_cache import AnswerCache, model_fingerprint
from difftune.evaluation.generation import generate_texts
from difftune.evaluation.intervals import wilson_interval
from difftune.evaluation.judges import Claim, Judge, Judgement, JudgeSilentError, JudgeUnavailableError
from difftune.evaluation.task import Clock, ItemTask, mean, share, without_nan
from difftune.rendering import chat_ids, text_ids

log = logging.getLogger(__name__)

PAPER = {
    "diff_v1": {"xsum": 0.53, "cnn_dm": 0.41, "multi_news": 0.61, "qasper": 0.39, "hotpotqa": 0.46, "2wikimqa": 0.36},
    "softmax": {"xsum": 0.44, "cnn_dm": 0.32, "multi_news": 0.42, "qasper": 0.28, "hotpotqa": 0.36, "2wikimqa": 0.29},
}
"""Accuracy by set in the paper, 3B models, judged by GPT-4o."""

_SUMMARISE = "{document}\n\nSummarize the text above in a few sentences."
_ASK = "{document}\n\nAnswer the question from the text above, briefly.\nQuestion: {question}"


@dataclass(frozen=True)
class SourceText:
    """A document, and what is asked about it."""

    id: str
    """Unique in its set."""
    document: str
    """The text."""
    question: str | None
    """None: a summary is asked for."""
    gold: Sequence[str]
    """The reference summary, or the valid answers."""


@dataclass(frozen=True)
class HallucinationSample:
    """One text and its judgement."""

    index: int
    """Place of the document in its set."""
    id: str
    """Of the document."""
    question: str | None
    """None: a summary."""
    gold: list[str]
    """The reference."""
    text: str
    """What the model wrote."""
    finished: bool
    """The model ended it itself."""
    verdict: str
    """One of `judges.VERDICTS`."""
    reason: str
    """The judge's words."""
    judge: str
    """Who judged."""


@dataclass(frozen=True)
class HallucinationResult:
    """Figures of one evaluation; NaN where nothing was judged."""

    samples: list[HallucinationSample] = field(repr=False)
    """Every text, in order."""
    num_items: int
    """How many there were to be."""
    judge: str
    """Who judged."""

    @property
    def complete(self) -> bool:
        """Whether every text was judged."""
        return len(self.samples) == self.num_items

    def metrics(self) -> dict[str, float]:
        """Accuracy with its 95% interval, and the share of answers of the judge that could not be read."""
        accuracy = mean([sample.verdict == "true" for sample in self.samples])
        low, high = wilson_interval(accuracy, len(self.samples))
        return {
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "unparsed": mean([sample.verdict == "unparsed" for sample in self.samples]),
            "n": float(len(self.samples)),
        }

    def __str__(self) -> str:
        """One line for the terminal."""
        figures = self.metrics()
        return f"{share(figures['accuracy'])} of {len(self.samples)} texts free of hallucination, says {self.judge}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON."""
        return {**without_nan(self.metrics()), "n": len(self.samples), "judge": self.judge}

    def row(self) -> dict[str, str]:
        """The figures as text, by column."""
        figures = self.metrics()
        return {
            "accuracy": share(figures["accuracy"]),
            "95% interval": f"{figures['accuracy_low']:.3f} to {figures['accuracy_high']:.3f}",
            "n": str(len(self.samples)),
            "unparsed": share(figures["unparsed"]),
            "judge": self.judge,
        }

    def tables(self) -> list[Table]:
        """The paper's accuracies, of another judge unless it is the paper's."""
        table = Table(title="accuracy in the paper, judged by GPT-4o", title_justify="left")
        table.add_column("")
        for name in PAPER["diff_v1"]:
            table.add_column(name, justify="right")
        for kind, title in (("diff_v1", "DIFF 3B"), ("softmax", "Transformer 3B")):
            table.add_row(f"paper: {title}", *(f"{value:.2f}" for value in PAPER[kind].values()), style="dim")
        return [table]


@dataclass
class HallucinationTask(ItemTask[HallucinationSample]):
    """Documents, and who judges what is made of them.

    Raises:
        ValueError: If there is no document.
    """

    name: str
    """Names the task in metrics and samples."""
    sources: Sequence[SourceText]
    """The set."""
    judge: Judge
    """Who judges."""
    max_new_tokens: int = 256
    """Longest text, in tokens."""
    batch_size: int = 8
    """Documents read together."""
    cache: Path | None = None
    """File for texts that were written and could not be judged yet. None: they are written again."""

    kind: ClassVar[str] = "hallucination"
    sample_type: ClassVar[type] = HallucinationSample

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(f"evaluation task {self.name!r} has no document")
        self._warned: Clock | None = None

    @property
    def num_items(self) -> int:
        """The number of documents."""
        return len(self.sources)

    def blocks(self, indices: list[int]) -> list[list[int]]:
        """A batch a block."""
        order = [index for block in super().blocks(indices) for index in block]
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[HallucinationSample]:
        """Write texts and have them judged; what the judge does not answer is left for the next run."""
        written = self._write(model, tokenizer, indices, clock)
        with ThreadPoolExecutor(self.judge.at_once) as threads:
            asked = {index: threads.submit(self._judge, index, text, clock) for index, (text, _) in written.items()}
        samples = []
        for index, (text, finished) in written.items():
            source = self.sources[index]
            try:
                judgement = asked[index].result()
            except JudgeUnavailableError as error:
                if self.failure is None:
                    log.warning("%s: no judgement, so the task stops here: %s", self.name, error)
                    self.failure = str(error)
                continue
            except JudgeSilentError as error:
                if self._warned is not clock:  # a clock is that of one run: one warning is enough for all of it
                    self._warned = clock
                    text = (
                        "%s: the judge gave no answer to text %s (%s): such texts do not count, the next run asks again"
                    )
                    log.warning(text, self.name, source.id, error)
                continue
            samples.append(
                HallucinationSample(
                    index=index,
                    id=source.id,
                    question=source.question,
                    gold=list(source.gold),
                    text=text,
                    finished=finished,
                    verdict=judgement.verdict,
                    reason=judgement.reason,
                    judge=self.judge.name,
                )
            )
        return samples

    def _judge(self, index: int, text: str, clock: Clock) -> Judgement:
        """One judgement; where the judge cannot be reached, the others need not try for long."""
        source = self.sources[index]
        try:
            return self.judge.judge(Claim(source.document, source.question, source.gold, text), clock.is_over)
        except JudgeUnavailableError:
            clock.ring()
            raise

    def summarise(self, samples: Iterable[HallucinationSample]) -> HallucinationResult:
        """Figures of the samples, of all parts together."""
        return HallucinationResult(sorted(samples, key=lambda one: one.index), self.num_items, self.judge.name)

    def _write(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> dict[int, tuple[str, bool]]:
        """Texts by index, from the cache where an earlier run wrote them; on disk before they are judged."""
        prompts = {index: _prompt(tokenizer, self.sources[index]) for index in indices}
        # Without a file nothing is found again, and nothing has to be told apart.
        state = "" if self.cache is None else model_fingerprint(model)
        keys = {index: _key(state, prompts[index], self.max_new_tokens) for index in indices}
        kept = AnswerCache(self.cache)
        missing = [index for index in indices if kept.get(keys[index]) is None]
        generations = generate_texts(
            model,
            tokenizer,
            [prompts[index] for index in missing],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            should_stop=clock.is_over,
        )
        for index, generation in zip(missing, generations, strict=True):
            if not generation.interrupted:
                kept.keep(keys[index], [generation.text.strip(), generation.finished])
        written = {index: kept.get(keys[index]) for index in indices}
        return {index: (text[0], text[1]) for index, text in written.items() if text is not None}


def _prompt(tokenizer: PreTrainedTokenizerBase, source: SourceText) -> list[int]:
    form = _SUMMARISE if source.question is None else _ASK
    content = form.format(document=source.document, question=source.question)
    if tokenizer.chat_template is None:
        return text_ids(tokenizer, content + "\n\n")
    chat = [{"role": "user", "content": content}]
    return chat_ids(tokenizer, chat, f"document {source.id}", add_generation_prompt=True)


def _key(state: str, prompt: list[int], max_new_tokens: int) -> str:
    return hashlib.sha256(json.dumps([state, prompt, max_new_tokens]).encode()).hexdigest()
