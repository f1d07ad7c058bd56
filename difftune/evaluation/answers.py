# ruff: noqa: RUF001
r"""Where the final answer stands in a text.

What a chat template or a reasoning model puts around an answer is passed over first: the text is that after the
thoughts (``</think>``, OpenThoughts' marks), before the end of the turn (``<|im_end|>``, ``</s>``) and, where there is
one, that in the last ``<answer>``. Then the rules, the first that finds something wins:

1. ``boxed``: the last complete ``\boxed{...}``. Boxes joined by nothing but a comma, ``and`` or ``or`` are one
   answer in parts. A box left open by the end of the text does not count.
2. ``hash``: what stands after the last ``####`` of a line (GSM8K's form), if it begins like a number or a formula, or
   if the line ends the text; so Markdown headings do not count.
3. ``phrase``: what follows "answer is", "answer:" or a heading "Answer", also in other languages, to the end of the
   sentence or to an explanation; in the next line where this one ends. The last of them that is more than a remark:
   "I hope this answer is clear" does not replace an answer.
4. ``whole``: the text itself, if it is one short line, as a model trained on answers alone writes it.
5. ``tail``: the end of the text, in which math-verify then looks for the last number or formula.

`normalise` gives an answer in one spelling; how it is compared is in `difftune.evaluation.answer_forms`.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from difftune.evaluation.answer_forms import is_formula, is_words
from difftune.evaluation.answer_text import (
    CJK,
    plain_digits,
    plain_spaces,
    plain_unicode,
    until_turn_end,
    without_currency,
    without_markdown,
)

_END_OF_THOUGHT = re.compile(r"</think>|<\|end_of_thought\|>|<\|begin_of_solution\|>")
_TAGGED = re.compile(r"[<\[](final_?answer|answer)[>\]](.*?)(?:[<\[]/\1[>\]]|$)", re.IGNORECASE | re.DOTALL)
# Escaped braces are consumed, so that only those that group are counted.
_BRACES = re.compile(r"\\\\|\\[{}]|(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<open>\{)|(?P<close>\})")
_JOINT = re.compile(r"(?:[\s$&]|\\[,;:! ()\[\]]|\\q?quad|\\text\{[^{}]*\}|,|;|\band\b|\bor\b)*")
_CONNECTIVE = re.compile(r",(?!\\)|;|\band\b|\bor\b")
_BEGINS_LIKE_MATHS = re.compile(r"[-+\u2212.(\[\d$\\]")
_COPULA = (
    r"(?:\b(?:is|would be|should be|must be|equals|comes to)\b"
    r"(?:\s+(?:therefore|thus|then|hence|indeed|just))*\s*:?|[:=\uff1a])"
)
_OTHER_NOUNS = (
    rf"(?:最终|正确)?答案|答え|正解|정답|답|(?<![{CJK}])答(?=[:：])|\b(?:Antwort|Lösung|Ergebnis|réponse|"
    r"respuesta|resposta|risposta|odpowiedź|cevap)\b|\bответ\b"
)
_OTHER_COPULAS = r"(?:\b(?:ist|lautet|beträgt|est|es|è|é|to)\b\s*:?|[是为為はは은는](?:[:：])?|[:=：—])"
_PHRASE = re.compile(
    rf"\banswer\b[^\n:=：]{{0,40}}?{_COPULA}|\b(?:correct|right) (?:option|choice)\b[^\n:=]{{0,20}}?{_COPULA}"
    rf"|\bfinal (?:result|solution)\b[^\n:=]{{0,20}}?{_COPULA}"
    rf"|^[\s#*_>-]*(?:the\s+)?(?:final\s+)?answer[*_\s:.]*$"
    rf"|(?:{_OTHER_NOUNS})[^\n:=：。]{{0,20}}?{_OTHER_COPULAS}|[故应所以]+选(?:[择项]|\s|[:：])*",
    re.IGNORECASE | re.MULTILINE,
)
# What stands before "answer" in a remark about it, and what is said of an answer without giving it.
_REMARK_BEFORE = re.compile(r"(?i)\b(?:this|hope|whether|if|because|since|note|please|know)\b[^.\n]*$")
_REMARK = re.compile(
    r"(?i)(?:\w+ed (?:to|by|from|on|with|in|as|using)\b|\w+ly (?!-?\d)\w|always|never|also|that|the|what|correct|right"
    r"|wrong|incorrect|clear|final|helpful|simple|obtained|based|only|an?\b|in\b|not\b|given\b|found\b|shown\b"
    r"|below|above|as follows)"
)
_SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bRs)\.\s+(?=[A-Z*_#\"'(])|(?<=[\d)}$*])\.\s+(?=[a-z])|[.!?]\s*$"
    r"|[!?]\s+(?=[A-Z])|[。！？]|(?<=[a-z])[!?]"
)
_EXPLANATION = re.compile(
    r"(?i)\s*(?:[,;(–—-]\s*)*\b"
    r"(?:because|since|which|where|due to|so that|i\.e\.|e\.g\.|that is|meaning|given that)(?=[\s,]).*"
    r"|\s*[,;(]\s*(?:as|so|not|hence|for|thus|and that|but|namely|or equivalently)\s.*"
    r"|;\s+[a-z]+ [a-z]+.*|\s+[-–—]\s+[a-z]{2,} [a-z]+.*"
    r"|(?<=\d)\s*[(]\s*[a-z]+ [a-z]+[^()]*\)$",
    re.DOTALL,
)
_RULE = re.compile(r"^[\s>*_`=~-]*$")
_DISPLAY = re.compile(r"\s*(\$\$|\\\[|\$)(.*?)(?:\$\$|\\\]|\$)", re.DOTALL)
_ENDING = re.compile(r"\s*(?:です|である|입니다|이다|だ)$")
_MOST_LINES = 30
_LONGEST_PHRASE = 100
_LONGEST_FORMULA = 1000
_LONGEST_WHOLE = 200
_TAIL = 2000

_LONGEST_ANSWER = 2000

_WRAPPERS = (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'))
# \text{5 apples} is five apples; \text{The answer is } 5 is five.
_TEXT_AROUND = re.compile(r"^\\text\s*\{([^{}]*\d[^{}]*)\}$")
_SAID_IN_TEXT = re.compile(r"^\\text\s*\{[^{}]*\b(?:is|are|be)[\s:]*\}\s*(?=\S)")
_NUMBER = re.compile(r"(-?)\s?(\d+(?:\.\d+)?|[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\.\d+)", re.ASCII)
_SPACED_NUMBER = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?", re.ASCII)


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
    text = until_turn_end(_after_thoughts(text)).strip()
    tagged = [match[2] for match in _TAGGED.finditer(text) if match[2].strip()]
    text = tagged[-1].strip() if tagged else text
    if not text:
        return None
    if (boxed := _last_box(text)) is not None:
        return Answer(_after_phrase(boxed) or boxed, "boxed")
    if (hashed := _after_hash(text)) is not None:
        return Answer(hashed, "hash")
    if (phrase := _after_phrase(text)) is not None:
        return Answer(phrase, "phrase")
    if "\n" not in text and len(text) <= _LONGEST_WHOLE:
        return Answer(normalise(text), "whole")
    return Answer(_tail(text), "tail")


def normalise(answer: str) -> str:
    """An answer in one spelling, without what is no part of it: emphasis, maths delimiters, currency, a full stop."""
    answer = answer.strip()
    if len(answer) > _LONGEST_ANSWER:
        return answer
    answer = plain_spaces(plain_digits(plain_unicode(answer))).strip()
    before = None
    while answer != before:
        before = answer
        answer = without_markdown(answer)
        if answer.endswith((".", ":")) and not answer.endswith((r"\right.", "..", r"\:")):
            answer = answer[:-1].rstrip()
        for left, right in _WRAPPERS:
            inner = answer[len(left) : len(answer) - len(right)]
            inside = inner.replace(r"\$", "")
            if answer.startswith(left) and answer.endswith(right) and inner.strip() and left not in inside:
                answer = inner.strip()
        answer = _TEXT_AROUND.sub(r"\1", _SAID_IN_TEXT.sub("", without_currency(answer)))
    answer = _ENDING.sub("", answer)
    answer = re.sub(r"^\+\s?(?=[\d.])", "", answer)  # math-verify reads "+1,000" as a pair of numbers
    return answer.replace(" ", "") if _SPACED_NUMBER.fullmatch(answer) else plain_digits(answer)


def plain_number(answer: str) -> Decimal | None:
    """The value of an answer that is nothing but a number in decimal digits, else None.

    Example:
        >>> plain_number("-1,234.50"), plain_number("1/2"), plain_number("12,34")
        (Decimal('-1234.50'), None, None)
    """
    match = _NUMBER.fullmatch(answer)
    return Decimal(match[1] + match[2].replace(",", "")) if match else None


def may_hold_maths(text: str) -> bool:
    """Whether a text has anything in it that math-verify could read as a number or a formula."""
    return any(character.isnumeric() or character in "\\$√πθ∞∅" for character in text)


def _after_thoughts(text: str) -> str:
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
    """What follows the last phrase that gives an answer; that of the last remark about it where no other does."""
    remark = None
    for marker in reversed(list(_PHRASE.finditer(text))):
        answer = _candidate(text, marker.end())
        if not answer or len(answer) > (_LONGEST_FORMULA if is_formula(answer) else _LONGEST_PHRASE):
            continue
        line = text[text.rfind("\n", 0, marker.start()) + 1 : marker.start()][-_LONGEST_PHRASE:]
        if _REMARK.match(answer) or (_REMARK_BEFORE.search(line) and is_words(answer)):
            remark = remark or answer
        else:
            return answer
    return remark


def _candidate(text: str, place: int) -> str:
    """The answer that begins at a place of a text: to the end of the sentence, in the next line where this one ends."""
    lines = text[place : place + _TAIL].split("\n")
    number = next((number for number, line in enumerate(lines[:_MOST_LINES]) if not _RULE.match(line)), None)
    if number is None:
        return ""
    if number > 0 and lines[number].lstrip().startswith("#"):
        return ""
    rest = "\n".join(lines[number:]).lstrip("*_ \t")
    if number > 0:
        rest = re.sub(r"^[-+\u2022] (?=\S)", "", rest)  # the only item of a list
    display = _DISPLAY.match(rest)
    if display and display[1] != "$":
        return normalise(display[2].strip())
    line = without_markdown(rest.split("\n", 1)[0])
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0]
    shorter = _EXPLANATION.sub("", sentence).rstrip(" ,;(")
    return normalise(shorter or sentence)


def _tail(text: str) -> str:
    """The end of a text, from the beginning of a line, so that no formula is cut in two."""
    if len(text) <= _TAIL:
        return text
    tail = text[-_TAIL:]
    return tail.split("\n", 1)[1] if "\n" in tail.rstrip("\n") else tail
