"""Which demonstrations a prompt shows, in which order, and what the prompt looks like."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from difftune.rendering import plain_ids, text_ids

ORDERS = ("random", "alternating")


class Labelled(Protocol):
    """A text and its class."""

    @property
    def text(self) -> str:
        """What is to be classified."""

    @property
    def label(self) -> str:
        """Its class, in words."""


def select(examples: Sequence[Labelled], count: int, seed: int) -> list[Labelled]:
    """So many demonstrations, drawn at random with as many of each class as can be.

    With fewer than there are classes, which classes are shown is drawn as well. Of two counts the larger has all
    demonstrations of the smaller.

    Raises:
        ValueError: If there are fewer.
    """
    if not 1 <= count <= len(examples):
        raise ValueError(f"{count} demonstrations cannot be drawn: there are {len(examples)}")
    return _round_robin(examples, random.Random(f"select {seed}"))[:count]


def arrange(demonstrations: Sequence[Labelled], order: str, seed: int) -> list[Labelled]:
    """The same demonstrations in another order.

    Args:
        demonstrations: What to arrange.
        order: `random`, or `alternating`: one of each class in turn, the classes in an order that is drawn.
        seed: Of the order.
    """
    draw = random.Random(f"order {seed}")
    if order == "alternating":
        return _round_robin(demonstrations, draw)
    return draw.sample(list(demonstrations), len(demonstrations))


def _round_robin(examples: Sequence[Labelled], draw: random.Random) -> list[Labelled]:
    """One of each class in turn; the classes and what is in them in an order that is drawn."""
    by_class: dict[str, list[Labelled]] = {}
    for example in examples:
        by_class.setdefault(example.label, []).append(example)
    classes = sorted(by_class)
    draw.shuffle(classes)
    for name in classes:
        draw.shuffle(by_class[name])
    longest = max(map(len, by_class.values()))
    return [by_class[name][turn] for turn in range(longest) for name in classes if turn < len(by_class[name])]


@dataclass(frozen=True)
class Template:
    """A prompt of demonstrations and a last text without its label, in the parts that are tokenised apart.

    ::

        Question: TEXT
        Type: LABEL
        ==
        Question: TEXT
        Type:

    A label ends with the first token of the separator, so that a label that is the beginning of another one is not
    preferred for being short.
    """

    tokenizer: PreTrainedTokenizerBase
    """Of the model."""
    text_prefix: str
    """What stands before a text."""
    label_prefix: str
    """What stands before a label."""
    separator: str = "\n==\n"
    """What stands between demonstrations."""

    def label(self, label: str) -> list[int]:
        """Tokens of a label, with the space before it, and without its end.

        Raises:
            ValueError: If the tokenizer does not cut the text before the label.
        """
        before = self._encode(f"\n{self.label_prefix}")
        both = self._encode(f"\n{self.label_prefix} {label}")
        if both[: len(before)] != before or len(both) == len(before):
            raise ValueError(
                f"the tokenizer joins {self.label_prefix!r} and the label {label!r} to one token: set another "
                "label_prefix"
            )
        return both[len(before) :]

    def answer(self, label: str) -> list[int]:
        """Tokens of a label and the one that ends it."""
        return [*self.label(label), self._encode(f"{self.separator}{self.text_prefix}")[0]]

    def query(self, text: str) -> list[int]:
        """Tokens of a text that follows demonstrations, up to its label."""
        return self._encode(f"{self.separator}{self.text_prefix} {text}\n{self.label_prefix}")

    def demonstrations(self, examples: Sequence[Labelled]) -> list[int]:
        """Tokens of demonstrations, with the special tokens that the tokenizer puts at the beginning."""
        first = f"{self.text_prefix} {examples[0].text}\n{self.label_prefix}"
        ids = [*text_ids(self.tokenizer, first), *self.label(examples[0].label)]
        for example in examples[1:]:
            ids += [*self.query(example.text), *self.label(example.label)]
        return ids

    def _encode(self, text: str) -> list[int]:
        return plain_ids(self.tokenizer, text)
