"""A judge of hallucination that needs no network: does a local model of natural language inference find it entailed?

Source:
    Laban et al., "SummaC: Re-Visiting NLI-based Models for Inconsistency Detection in Summarization" (2022): every
    sentence of a text against every part of its document, the best part counting.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from difftune.evaluation.judges import Claim, Judgement, JudgeUnavailableError
from difftune.evaluation.span_support import contains

_BATCH = 16
_END_OF_SENTENCE = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["')\]])\s+|\n+""")


@dataclass
class EntailmentJudge:
    """A text is true if a classifier finds each of its sentences entailed by some part of the document.

    A document longer than the classifier can read is cut into parts that overlap. Of an answer to a question, question
    and answer together are the sentence; the answer must besides hold a valid one, or be entailed by the question with
    a valid one. It is as good as the classifier, which is far smaller than the paper's judge: for following a model and
    for comparing two under the same judge, not for a comparison with the paper's figures.

    Raises:
        ValueError: If the classifier's labels do not say which of them is entailment, or it reads too little.
    """

    model: PreTrainedModel
    """A sequence classifier of transformers' kind, with `config.id2label`."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with overflowing tokens (a fast one)."""
    label: str
    """What the classifier is called in tables and samples."""

    def __post_init__(self) -> None:
        self._entailment = entailment_label({int(at): name for at, name in (self.model.config.id2label or {}).items()})
        # RoBERTa's positions begin at 2, and nobody misses two tokens.
        positions = getattr(self.model.config, "max_position_embeddings", None) or 514
        self._length = min(self.tokenizer.model_max_length, positions - 2)
        if self._length < 32 or not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.label} reads {self._length} tokens with a {type(self.tokenizer).__name__}: the judge needs 32 "
                "or more, and a tokenizer with tokenizer.json"
            )
        self.model.eval()

    at_once = 1

    @property
    def name(self) -> str:
        """Says that it is an offline judge, and which."""
        return f"entailment by {self.label} (offline)"

    def judge(self, claim: Claim, is_over: Callable[[], bool] = lambda: False) -> Judgement:
        """Every sentence against the document.

        Raises:
            JudgeUnavailableError: If the time was over.
        """
        if not claim.text.strip():
            return Judgement("false", "says nothing")
        told = list(sentences(claim.text)) if claim.question is None else [f"{claim.question} {claim.text.strip()}"]
        chances = [(self._entailed(claim.document, one, is_over), one) for one in told]
        missing = [f"{one!r} ({chance:.2f})" for chance, one in chances if chance < 0.5]
        right = claim.question is None or any(
            contains(claim.text, gold) or self._entailed(f"{claim.question} {gold}", told[0], is_over) >= 0.5
            for gold in claim.gold
        )
        reason = f"{len(told) - len(missing)} of {len(told)} sentences entailed; not: {', '.join(missing) or 'none'}"
        verdict = "true" if right and not missing else "false"
        return Judgement(verdict, reason + ("" if right else "; no valid answer"))

    def _entailed(self, premise: str, sentence: str, is_over: Callable[[], bool]) -> float:
        """How likely the sentence is entailed: by the best part of the premise, and for its own least likely part."""
        return min(max(self._chances(premise, part, is_over)) for part in self._cut(sentence))

    def _cut(self, sentence: str) -> list[str]:
        """A sentence in parts of at most half of what the classifier reads: nothing of it may be left out."""
        size = self._length // 2
        ids = self.tokenizer(sentence, add_special_tokens=False, truncation=False)["input_ids"]
        if len(ids) <= size:
            return [sentence]
        return [str(self.tokenizer.decode(ids[start : start + size])) for start in range(0, len(ids), size)]

    @torch.no_grad()
    def _chances(self, premise: str, sentence: str, is_over: Callable[[], bool]) -> Iterator[float]:
        encoded: Any = self.tokenizer(
            premise,
            sentence,
            truncation="only_first",
            max_length=self._length,
            # A fact that falls on a cut is whole in the next part.
            stride=self._length // 4,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        encoded.pop("overflow_to_sample_mapping", None)
        device = next(self.model.parameters()).device
        for start in range(0, len(encoded["input_ids"]), _BATCH):
            if is_over():
                raise JudgeUnavailableError("the time was over")
            batch = {name: values[start : start + _BATCH].to(device) for name, values in encoded.items()}
            yield from self.model(**batch).logits.float().softmax(-1)[:, self._entailment].tolist()


def load_entailment_judge(path: str) -> EntailmentJudge:
    """A judge from a folder or hub id of a classifier of natural language inference.

    Args:
        path: Weights, config and tokenizer, such as those of roberta-large-mnli.

    Raises:
        ValueError: If they cannot be read, the weights are not those of a classifier, or its labels do not say which
            of them is entailment.
    """
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no classifier that transformers can load: {error}") from error
    if info["missing_keys"]:
        # Transformers would draw them at random, and so the verdicts.
        raise ValueError(
            f"{path} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}: nli_model must be a model that "
            "was trained on natural language inference"
        )
    if torch.cuda.is_available():
        model = model.to("cuda")
    return EntailmentJudge(model, tokenizer, path.rstrip("/").rpartition("/")[2])


def entailment_label(labels: dict[int, str]) -> int:
    """Which label says that the second text follows from the first.

    Args:
        labels: Names by index, as `config.id2label`.

    Raises:
        ValueError: If not exactly one is entailment, or none is its contrary.

    Example:
        >>> entailment_label({0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"})
        2
    """
    names = {at: name.lower() for at, name in labels.items()}
    found = [at for at, name in names.items() if name.startswith("entail")]
    contrary = [at for at, name in names.items() if name.startswith(("contra", "not"))]
    if len(found) != 1 or not contrary:
        raise ValueError(
            f"the labels of nli_model are {', '.join(labels.values())}: one must be called entailment and another "
            "contradiction or not_entailment; if they only have other names, set id2label in its config.json"
        )
    return found[0]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text.

    Example:
        >>> list(sentences("Troy fell. Who won? The Greeks!"))
        ['Troy fell.', 'Who won?', 'The Greeks!']
    """
    return (part.strip() for part in _END_OF_SENTENCE.split(text) if part.strip())
