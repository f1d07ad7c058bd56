r"""An answer in the form that is compared: what it is called, its unit, choice letter or scale, and code made LaTeX.

`math_form` writes the text in which math-verify finds the answer and nothing else.
"""

import re
from dataclasses import dataclass
from typing import Final

from difftune.evaluation.answer_text import CJK

_TEXT = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname|rm)\b\s*"
_COMMAND = re.compile(rf"\\(?:begin|end)\s*\{{[^{{}}]*\}}(?:\{{[lcr|\s]*\}})?|{_TEXT}\{{[^{{}}]*\}}|\\[A-Za-z]+")
_WORD = re.compile(rf"[^\W\d_]{{3,}}|[{CJK}]")
_FUNCTIONS = re.compile(r"(?i)sin|cos|tan|cot|sec|csc|log|exp|sqrt|max|min|gcd|lcm|mod|det")
_QUANTITY = re.compile(rf"([+-]?\s?\d[\d.,/]*)\s*((?:(?<=\s)[A-Za-z]|[{CJK}])[A-Za-z{CJK} .'-]*)", re.ASCII)
# A number before one of these is not the whole answer.
_NOT_A_UNIT = re.compile(r"(?i)(and|or|times|plus|minus|over|divided|hundred|percent)\b")

_SCALES: Final = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_SCALE = re.compile(
    rf"([+-]?\s?\d[\d.,]*)\s*(?:{_TEXT}\{{\s*)?({'|'.join(_SCALES)})\b\s*\}}?(.*)", re.IGNORECASE | re.ASCII
)
_CHOICE = re.compile(
    rf"(?:(?:[Oo]ption|[Cc]hoice)\s*)?(?:{_TEXT}\{{\s*)?"
    r"(?:\(\s*(?P<round>[A-J])\s*\)|(?P<marked>[A-J])\s*(?:[).:](?=[\s}]|\\|$))|(?P<bare>[A-J])(?=\s*\}?$))"
    r"\s*\.?\s*\}?(?:\\[ ,;:]|~|\s)*(?P<rest>.*)",
    re.DOTALL,
)
_UNIT_WORDS: Final = {
    "mm": "mm millimeter millimetre 毫米", "cm": "cm centimeter centimetre 厘米 公分",
    "dm": "dm decimeter decimetre 分米", "m": "m meter metre 米 公尺", "km": "km kilometer kilometre 千米 公里",
    "inch": "in inch inches", "foot": "ft foot feet", "yard": "yd yard", "mile": "mi mile", "mg": "mg milligram 毫克",
    "g": "g gram 克", "kg": "kg kilogram 千克 公斤", "ton": "ton tonne 吨", "ounce": "oz ounce", "pound": "lb pound",
    "ms": "ms millisecond", "second": "s sec second 秒", "minute": "min minute 分钟", "hour": "h hr hour 小时 時間",
    "day": "day 天", "week": "week 周", "month": "month", "year": "yr year 年", "ml": "ml mL milliliter 毫升",
    "l": "L liter litre 升", "mph": "mph", "kph": "kph", "hz": "Hz hertz", "n": "N newton", "j": "J joule",
    "w": "W watt", "v": "V volt", "a": "A ampere amp", "pa": "Pa pascal", "cent": "cent", "dollar": "dollar",
    "euro": "euro",
}  # fmt: skip
_UNITS: Final = {
    spelling: name
    for name, words in _UNIT_WORDS.items()
    for word in words.split()
    for spelling in (word, word + "s" if len(word) > 1 else word)
}
_POWER = r"(?:\s*\^\s*\{?-?[1-4]\}?)?"
_ONE_UNIT = rf"(?:{'|'.join(sorted(map(re.escape, _UNITS), key=len, reverse=True))}){_POWER}(?![A-Za-z])"
_WORDED = rf"(?:{_TEXT}\{{[~\s]*[^{{}}]*\}}|\\rm\s+[A-Za-z]+){_POWER}"
_UNIT = re.compile(
    rf"^(?P<value>.*(?:[\d)}}!]|\\pi))(?P<gap>(?:\s|~|\\[,;:! ])*)"
    rf"(?P<unit>\^\s*\{{?\s*\\circ\s*\}}?\s*(?:{_TEXT}\{{\s*)?[CF]\b\}}?|(?:square\s+|cubic\s+|sq\.?\s+)?{_ONE_UNIT}(?:\s*(?:/|\bper\b|\\cdot)\s*{_ONE_UNIT})*|{_WORDED})$",
    re.DOTALL,
)
_FUNCTION_NAME = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|gcd|lcm|max|min)(?![A-Za-z])"
)
_TIMES_TEN = re.compile(r"(?<=\d)\s*x\s*(?=10\s*(?:\^|\*\*))")
_PERCENT = re.compile(rf"(.+?)\s*(?:\\?%|(?:{_TEXT}\{{\s*)?(?:percent|per cent|pct)\.?\s*\}}?)")
_CODE = re.compile(r"\*\*|\b(?:sqrt|exp|pi|oo|inf|infinity|cbrt|abs|theta)\b|[<>!]=|(?<=[\w)])\s*\*\s*(?=[\w(\\])")
_CODE_NAMES: Final = {"pi": r"\pi ", "oo": r"\infty ", "inf": r"\infty ", "infinity": r"\infty ", "theta": r"\theta "}
_CODE_CALLS: Final = {"sqrt": r"\sqrt{%s}", "cbrt": r"\sqrt[3]{%s}", "exp": "e^{%s}", "abs": "|%s|"}
_CALL = re.compile(r"(?:(?<![\\A-Za-z])(sqrt|cbrt|exp|abs)\s*|(?<=[\w)}])\s*\^\s*)\(")
_TIME = re.compile(r"0?(\d{1,2}(?::|\{:\})[0-5]\d)\s*(?:\\[,; ]|~)*\s*(?:\\text\s*\{)?\s*([AaPp])\.?\s?[Mm]\.?\s*\}?")
_AND = re.compile(rf"\s*[,;]?\s*(?:{_TEXT}\{{[~\s]*,?\s*(?:and|or)[~\s]*\}}|(?<![\\\w])(?:and|or)\b)(?:\s|~|\\[,; ])*")
_TEXT_OPEN = re.compile(rf"{_TEXT}\{{([^{{}}]*)\}}")
_OPEN_INTERVAL = re.compile(r"(?P<left>[\]\[(])(?P<inner>[^\[\](){}]+[,;][^\[\](){}]+)(?P<right>[\[\])])")
_APPROXIMATELY = re.compile(
    r"^(?:~|\\approx|\\simeq|(?:approximately|about|roughly|around|exactly|approx\.?|nearly|simply|just)\b|=)\s*"
    r"(?=[-+\d.$\\(=])"
)

_SPELT_OUT = re.compile(r"[A-Za-z -]+\s\((-?[\d.,]+)\)")
_YES_OR_NO = re.compile(r"(?i)(yes|no|true|false)[,.;:!]\s.*", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """An answer to a question of multiple choice."""

    letter: str
    """A to J."""
    rest: str
    """What is written beside the letter; may be empty."""


def choice_of(answer: str) -> Choice | None:
    """The letter and the text of an answer such as ``(C) 14``, ``C.``, ``option C``; None for anything else."""
    match = _CHOICE.fullmatch(answer.strip())
    if match is None:
        return None
    return Choice(match["round"] or match["marked"] or match["bare"], match["rest"].strip())


def split_unit(answer: str) -> tuple[str, str]:
    """An answer and its unit, which is empty where there is none that is known or marked as text.

    Example:
        >>> split_unit("9 km/h"), split_unit("9x")
        (('9', 'km/hour'), ('9x', ''))
    """
    match = _UNIT.match(answer)
    if match is None:
        return answer, ""
    value, unit = match["value"], match["unit"]
    text = re.sub(r"[{}~\s]|\\[a-z]+", " ", _TEXT_OPEN.sub(r" \1 ", unit)).strip()
    if not match["gap"] and len(text) == 1 and "\\" not in unit:
        return answer, ""  # 5m is a product
    if re.match(rf"(?:(?i:and|or|if|for|when|is|not|where|percent|mod|{'|'.join(_SCALES)})|[A-J]$)\b", text):
        return answer, ""
    if value.count("{") != value.count("}") or value.count("(") != value.count(")"):
        return answer, ""
    names = re.findall(r"[^\W\d_]+|\^\s*-?\d|/", text.replace(" per ", "/"))
    return value.strip(), "".join(_UNITS.get(name, name if name[0] in "^/" else name.lower() + " ") for name in names)


def are_different_units(left: str, right: str) -> bool:
    """Whether two units are both known measures, and not the same one."""
    known = set(_UNITS.values())
    parts = [re.split(r"[\^/\d]+", unit)[0].strip() for unit in (left, right)]
    return left != right and all(part in known for part in parts)


def percentage(answer: str) -> str | None:
    """What stands before a sign or word for percent at the end of an answer; None where there is none."""
    match = _PERCENT.fullmatch(answer)
    return match[1] if match else None


def scaled(answer: str) -> str:
    r"""A number with its word as a product: ``5 million`` is ``5 \cdot 1000000``."""
    match = _SCALE.fullmatch(answer)
    if match is None or re.match(r"\s*(?:and\b|\d)", match[3]):
        return answer
    return rf"{match[1].replace(',', '')} \cdot {_SCALES[match[2].lower()]}"


def clock_time(answer: str) -> str | None:
    """A time of day with its half, in one spelling, such as ``4:45pm``; None where the answer is something else."""
    match = _TIME.fullmatch(answer.strip())
    return f"{match[1].replace('{:}', ':')}{match[2].lower()}m" if match else None


def as_latex(answer: str) -> str:
    r"""An answer in programmers' spelling as LaTeX: ``2*sqrt(x+1)`` is ``2\cdot \sqrt{x+1}``; LaTeX is left alone."""
    answer = answer.replace(r"\not=", r"\neq ").replace(r"\not =", r"\neq ").replace(r"\varnothing", r"\emptyset")
    answer = _TIMES_TEN.sub(r"\\times ", _APPROXIMATELY.sub("", answer))
    answer = answer.replace(r"\langle", "(").replace(r"\rangle", ")")
    opened = _OPEN_INTERVAL.fullmatch(answer)
    if opened and (opened["left"] == "]" or opened["right"] == "["):
        left, right = (
            "(" if opened["left"] == "]" else opened["left"],
            ")" if opened["right"] == "[" else opened["right"],
        )
        answer = left + opened["inner"] + right
    ratio = re.fullmatch(r"(\d+) to (\d+)", answer)
    if ratio:
        return f"{ratio[1]}:{ratio[2]}"
    if "\\text" not in answer:
        answer = _FUNCTION_NAME.sub(r"\\\1 ", answer)
    if not _words(_AND.sub(", ", answer)):
        answer = _AND.sub(", ", answer).strip(", ")
    if _CODE.search(answer) and not re.search(r"\\(?:text|begin)", answer):
        answer = _calls(answer.replace("**", "^"))
        answer = re.sub(r"(?<![\\A-Za-z])(pi|oo|inf|infinity|theta)(?![A-Za-z])", lambda m: _CODE_NAMES[m[1]], answer)
        answer = re.sub(r"(?<=[\w)}])\s*\*\s*(?=[\w(\\])", r"\\cdot ", answer)
        answer = answer.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\neq ")
    return answer


def is_words(answer: str) -> bool:
    """Whether an answer is language: words, and no digit or formula."""
    return bool(_words(answer)) and not re.search(r"[\d\\$^_=]", answer)


def is_formula(answer: str) -> bool:
    """Whether an answer has no language in it."""
    return not _words(answer)


def short_form(answer: str) -> str:
    """What counts of ``twelve (12)`` and of ``Yes, she has``; anything else as it is."""
    short = _SPELT_OUT.fullmatch(answer) or _YES_OR_NO.fullmatch(answer)
    return short[1] if short else answer


def words_of(answer: str) -> str | None:
    r"""An answer with words in it as they sound: no case, marks, spaces or ``\text``; None without words."""
    bare = _TEXT_OPEN.sub(r"\1", answer)
    if not _words(bare) and bare.lower() not in ("no", "yes"):
        return None
    if re.search(r"[\\^_=<>|+*/]", bare):
        return None
    return (
        re.sub(r"[\s\"'.,!?()*~-]+", "", bare).casefold()
        if re.search(r"\d", bare) is None
        else (re.sub(r"[\s\"'!?*~]+", "", bare).rstrip(".").casefold())
    )


def math_form(text: str, rule: str) -> str:
    r"""An answer that a rule found, as a text in which math-verify finds it and nothing else.

    A formula goes into a ``\boxed{}``, words into ``\boxed{\text{}}`` (else ``yes`` would be y times e times s), a
    number with a unit into ``\boxed{5\text{ apples}}``. A sentence stays a sentence.
    """
    if rule == "tail" or any(mark in text for mark in ("$", r"\(", r"\[")):
        return text
    text = as_latex(scaled(text))
    if is_words(text) or re.match(r"not\b", text):
        return rf"\boxed{{\text{{{text}}}}}"
    text = split_unit(text)[0]
    quantity = _QUANTITY.fullmatch(text)
    if quantity and _words(quantity[2]) and not _NOT_A_UNIT.match(quantity[2]):
        return rf"\boxed{{{quantity[1]}\text{{ {quantity[2]}}}}}"
    if rule in ("phrase", "whole") and _words(text):
        return f"The final answer is {text}" if rule == "phrase" else text
    return rf"\boxed{{{text}}}"


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(_COMMAND.sub(" ", text)) if not _FUNCTIONS.fullmatch(word)]


def _calls(text: str) -> str:
    """Calls and powers of brackets, ``sqrt(x+1)`` and ``2^(n+1)``, in LaTeX's braces."""
    place = 0
    while match := _CALL.search(text, place):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            return text
        form = _CODE_CALLS.get(match[1] or "", "^{%s}")
        text = text[: match.start()] + form.replace("%s", text[match.end() : end - 1]) + text[end:]
        place = match.start() + 1
    return text
