r"""Where the final answer stands in a text, and how it is spelled for the comparison.

The rules, the first that finds something wins:

1. ``boxed``: the last complete ``\boxed{...}``. Boxes joined by nothing but a comma, ``and`` or ``or`` are one
   answer in parts. A box left open by the end of the text does not count.
2. ``hash``: what stands after the last ``####`` of a line (GSM8K's form), if it begins like a number or a formula, or
   if the line ends the text; so Markdown headings do not count.
3. ``phrase``: what follows the last "answer is", "answer:" or "answer =", to the end of the sentence.
4. ``whole``: the text itself, if it is one short line, as a model trained on answers alone writes it.
5. ``tail``: the end of the text, in which math-verify then looks for the last number or formula.

Where a reasoning model closes its thoughts (``</think>`` or OpenThoughts' marks), only what comes after is looked at.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

_END_OF_THOUGHT = re.compile(r"</think>|<\|end_of_thought\|>|<\|begin_of_solution\|>")
_END_OF_SOLUTION = "<|end_of_solution|>"
# Escaped braces are consumed, so that only those that group are counted.
_BRACES = re.compile(r"\\\\|\\[{}]|(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<open>\{)|(?P<close>\})")
_JOINT = re.compile(r"(?:[\s$&]|\\[,;:! ()\[\]]|\\q?quad|\\text\{[^{}]*\}|,|;|\band\b|\bor\b)*")
_CONNECTIVE = re.compile(r",(?!\\)|;|\band\b|\bor\b")
_BEGINS_LIKE_MATHS = re.compile(r"[-+\u2212.(\[\d$\\]")
_PHRASE = re.compile(r"(?i)\banswer\b[^\n:=]{0,40}?(?:\bis\b\s*:?|[:=])[*_\s]*")
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)\.\s+(?=[A-Z])")
_MOST_LINES = 30
_LONGEST_PHRASE = 100
_LONGEST_WHOLE = 200
_TAIL = 2000

_WRAPPERS = (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_DELIMITERS = ("$", r"\(", r"\[")
_NUMBER = re.compile(r"(-?)\s?(\d+(?:\.\d+)?|[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\.\d+)", re.ASCII)
_SPACED_NUMBER = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?", re.ASCII)
_QUANTITY = re.compile(r"([+-]?\s?\d[\d.,/]*)\s+([A-Za-z][A-Za-z .'-]*)", re.ASCII)
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
# A number before one of these is not the whole answer.
_NOT_A_UNIT = re.compile(
    r"(?i)(and|or|times|plus|minus|over|divided|hundred|thousand|million|billion|trillion|dozen|percent)\b"
)
_FUNCTIONS = re.compile(r"(?i)sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|gcd|lcm|mod|det")


@dataclass(frozen=True)
class Answer:
    """The final answer of a text."""

    text: str
    """As it stands there, without the marks around it."""
    rule: str
    """Which rule found it: boxed, hash, phrase, whole or tail."""


def find_answer(text: str) -> Answer | None:
    r"""The final answer of a text by the rules of this module; None if the text is blank.

    Example:
        >>> find_answer(r"First \boxed{3}. No, it is \boxed{4}.")
        Answer(text='4', rule='boxed')
    """
    text = _after_thoughts(text).strip()
    if not text:
        return None
    if (boxed := _last_box(text)) is not None:
        return Answer(boxed, "boxed")
    if (hashed := _after_hash(text)) is not None:
        return Answer(hashed, "hash")
    if (phrase := _after_phrase(text)) is not None:
        return Answer(phrase, "phrase")
    if "\n" not in text and len(text) <= _LONGEST_WHOLE:
        return Answer(normalise(text), "whole")
    return Answer(_tail(text), "tail")


def normalise(answer: str) -> str:
    """An answer without what does not belong to it: white space, emphasis, maths delimiters, currency, a full stop."""
    answer = answer.replace("\u2212", "-").strip()
    before = None
    while answer != before:
        before = answer
        if answer.endswith(".") and not answer.endswith((r"\right.", "..")):
            answer = answer[:-1].rstrip()
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner.strip() and left not in inner:
                answer = inner.strip()
        answer = re.sub(r"(?<=\d,)\\!(?=\d{3})", "", answer)  # MATH writes 15,\!000, close together
        answer = re.sub(r"^(-?)\\?\$(?=\s?[\d.][\d,.]*$)", r"\1", answer).strip()
    answer = re.sub(r"^\+\s?(?=[\d.])", "", answer)  # math-verify reads "+1,000" as a pair of numbers
    return answer.replace(" ", "") if _SPACED_NUMBER.fullmatch(answer) else answer


def plain_number(answer: str) -> Decimal | None:
    """The value of an answer that is nothing but a number in decimal digits, else None.

    Example:
        >>> plain_number("-1,234.50"), plain_number("1/2"), plain_number("12,34")
        (Decimal('-1234.50'), None, None)
    """
    match = _NUMBER.fullmatch(answer)
    return Decimal(match[1] + match[2].replace(",", "")) if match else None


def is_words(answer: str) -> bool:
    """Whether an answer is language: words, and no digit or formula."""
    return bool(_words(answer)) and not re.search(r"[\d\\$^_=]", answer)


def may_hold_maths(text: str) -> bool:
    """Whether a text has anything in it that math-verify could read as a number or a formula."""
    return any(character.isdigit() or character in "\\$" for character in text)


def math_form(answer: Answer) -> str:
    r"""The answer as a text in which math-verify finds it and nothing else.

    A formula goes into a ``\boxed{}``, words into ``\boxed{\text{}}`` (else ``yes`` would be y times e times s), a
    number with a unit into ``\boxed{5\text{ apples}}``. A sentence stays a sentence.
    """
    text = answer.text if answer.rule == "tail" else normalise(answer.text)
    if answer.rule == "tail" or any(mark in text for mark in _DELIMITERS):
        return text
    if is_words(text):
        return rf"\boxed{{\text{{{text}}}}}"
    quantity = _QUANTITY.fullmatch(text)
    if quantity and _words(quantity[2]) and not _NOT_A_UNIT.match(quantity[2]):
        return rf"\boxed{{{quantity[1]}\text{{ {quantity[2]}}}}}"
    if answer.rule in ("phrase", "whole") and _words(text):
        return f"The final answer is {text}" if answer.rule == "phrase" else text
    return rf"\boxed{{{text}}}"


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(_COMMAND.sub(" ", text)) if not _FUNCTIONS.fullmatch(word)]


def _after_thoughts(text: str) -> str:
    text = text.split(_END_OF_SOLUTION, 1)[0]
    ends = list(_END_OF_THOUGHT.finditer(text))
    after = text[ends[-1].end() :] if ends else ""
    return after if after.strip() else text


def _last_box(text: str) -> str | None:
    """The content of the last box and of those joined to it. One pass: looping models nest thousands."""
    stack: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, str]] = []
    for token in _BRACES.finditer(text):
        if token["box"]:
            stack.append((token.start(), token.end()))
        elif token["open"]:
            stack.append(None)
        elif token["close"] and stack and (opened := stack.pop()) is not None:
            start, inside = opened
            while boxes and boxes[-1][0] > start:
                boxes.pop()  # an inner box is part of the outer one
            boxes.append((start, token.end(), text[inside : token.start()].strip()))
    boxes = [box for box in boxes if box[2]]
    if not boxes:
        return None
    parts = [boxes[-1][2]]
    for left, right in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        between = text[left[1] : right[0]]
        if len(between) > _LONGEST_PHRASE or not (_JOINT.fullmatch(between) and _CONNECTIVE.search(between)):
            break
        if left[2] not in parts:
            parts.insert(0, left[2])
    return ", ".join(parts)


def _after_hash(text: str) -> str | None:
    lines = text.split("\n")
    for index in reversed(range(len(lines))):
        _, mark, answer = lines[index].rstrip("# \t").rpartition("####")
        answer = answer.strip()
        if mark and (_BEGINS_LIKE_MATHS.match(answer) or index == len(lines) - 1):
            for line in lines[index + 1 : index + 1 + _MOST_LINES]:
                if not _is_open(answer):
                    break
                answer += "\n" + line
            return answer
    return None


def _is_open(formula: str) -> bool:
    """Whether a formula goes on in the next line, as a matrix does."""
    return formula.count("{") > formula.count("}") or formula.count(r"\begin") > formula.count(r"\end")


def _after_phrase(text: str) -> str | None:
    markers = list(_PHRASE.finditer(text))
    for marker in reversed(markers):
        line = text[marker.end() :].split("\n", 1)[0]
        answer = normalise(_SENTENCE_END.split(line, maxsplit=1)[0])
        if answer and len(answer) <= _LONGEST_PHRASE:
            return answer
    return None


def _tail(text: str) -> str:
    """The end of a text, from the beginning of a line, so that no formula is cut in two."""
    if len(text) <= _TAIL:
        return text
    tail = text[-_TAIL:]
    return tail.split("\n", 1)[1] if "\n" in tail.rstrip("\n") else tail
