r"""One spelling for what people and models spell in many ways: Unicode, Markdown, digits in groups, currency, units.

Each function takes a text and gives it back in LaTeX's or ASCII's spelling; none decides whether an answer is right.
"""

import re
import unicodedata

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
"""Letters of languages that are written without spaces between words, as a part of a character class."""

_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-",
    "\u2044": "/", "\u2215": "/", "\u00f7": "/", "\u2236": ":",
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u3002": ".", "\u3001": ",", "\u300c": '"', "\u300d": '"',
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2217": "*",
    "\u2264": r"\le ", "\u2a7d": r"\le ", "\u2265": r"\ge ", "\u2a7e": r"\ge ", "\u2260": r"\neq ",
    "\u2248": r"\approx ", "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u221e": r"\infty ", "\u2205": r"\emptyset ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2209": r"\notin ", "\u2282": r"\subset ",
    "\u2286": r"\subseteq ", "\u2192": r"\to ", "\u2220": r"\angle ", "\u25b3": r"\triangle ", "\u2225": r"\parallel ",
    "\u22a5": r"\perp ", "\u00b0": r"^\circ ", "\u00ba": r"^\circ ", "\u2026": r"\ldots ", "\u22ef": r"\cdots ",
    "\u27e8": r"\langle ", "\u27e9": r"\rangle ",
    "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}", "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}", "\u221d": r"\propto ", "\u2211": r"\sum ", "\u222b": r"\int ", "\u2202": r"\partial ",
}  # fmt: skip
_GREEK = re.compile("[\u03b1-\u03c9\u0393\u0394\u0398\u039b\u039e\u03a0\u03a3\u03a6\u03a8\u03a9]")
_TRANSLATION = str.maketrans(_SYMBOLS)
# Letters and digits that Unicode calls raised or lowered; the ordinal signs are taken for degrees.
_SHIFTED = {
    letter: unicodedata.decomposition(letter).split()
    for letter in map(chr, (*range(0xB2, 0x300), *range(0x1D2C, 0x1D6B), *range(0x2070, 0x20A0), 0x2C7C))
    if letter != "\u00ba"
}
_SUPERSCRIPTS = {letter: chr(int(parts[1], 16)) for letter, parts in _SHIFTED.items() if parts[:1] == ["<super>"]}
_SUBSCRIPTS = {letter: chr(int(parts[1], 16)) for letter, parts in _SHIFTED.items() if parts[:1] == ["<sub>"]}
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile(r"(\d?)\s?([\u00bc-\u00be\u2150-\u215e])")
_ROOT = re.compile(r"([\u221a-\u221c])\s*(\((?:[^()]|\([^()]*\))*\)|\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+|\{[^{}]*\})")
_ROOT_DEGREES = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
_WIDE = re.compile(r"[\uff01-\uff5e\u3000]")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")

_TURN_END = re.compile(
    r"</s>|<eos>|<end_of_turn>|<\|(?:im_end|eot_id|endoftext|end_of_text|end|end_of_solution|eom_id|return)\|>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_FENCE = re.compile(r"```[A-Za-z]*")
_EMPHASIS = re.compile(r"(?<![\w)*}])(\*{2,3}|__|`+)(?=[^\s*])([^*`\n]+?)(?<![\s*])\1(?![\w(*])")
_MARKS_BEFORE = re.compile(r"^(?:[*`>\s]|#+\s|_{1,3}(?=\S)(?!\{)|~~|[-+*\u2022]\s+(?=[^\d\s.]|\d.*\n))+")
_MARKS_AFTER = re.compile(r"(?<![\^\\])(?:[*`\s]|(?<=[^\s_\\])_{1,3}|~~)+$")

_GROUP_MARK = r"(?:\\[,!;: ]|,\\!|~|\{,\}|['\u2019\u00a0\u2007\u2009\u200a\u202f])"
_GROUPED = re.compile(rf"(?<![\w.,'])[1-9]\d{{0,2}}(?:({_GROUP_MARK})\d{{3}})(?:\1\d{{3}})*(?!\d|\1\d)")
_DOTTED = re.compile(r"(?<![\w.,])([1-9]\d{0,2}(?:\.\d{3}){2,})(?:,(\d+))?(?![\w.,])")
_DOT_AND_COMMA = re.compile(r"(?<![\w.,])([1-9]\d{0,2}(?:\.\d{3})+),(\d+)(?![\d.,])")
_SPACED_AND_COMMA = re.compile(
    r"(?<![\w.,])([1-9]\d{0,2}(?:(?:\\[,; ]|[\u00a0\u2007\u2009\u202f])\d{3})+),(\d{1,2}|\d{4,})(?![\w.,])"
)
_DECIMAL_BRACES = re.compile(r"(?<=\d)\{,\}(?=\d)")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_MIXED = re.compile(r"(-?\s?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?!\w)")

_MONEY_WORD = r"US\s?\\?\$|(?:USD|EUR|GBP|CNY|RMB|JPY|INR|CAD|AUD|CHF)\b|Rs\.?(?=\s|\d)|\\text\{\s*Rs\.?\s*\}|\\?\$|[\u20ac\u00a3\u00a5\u20b9\u20a9]|\\(?:euro|pounds)\b\s*"  # noqa: E501
_MONEY_BEFORE = re.compile(rf"^([-+]?)\s*(?:{_MONEY_WORD})\s*(?=[\d.][^$]*$)")
_MONEY_AFTER = re.compile(rf"(?<=[\d.}}])\s*(?:{_MONEY_WORD}|\\text\s*\{{\s*[\u20ac\u00a3\u00a5\u20b9]\s*\}})$")


def plain_unicode(text: str) -> str:
    r"""Unicode's signs as LaTeX: ``2½`` is ``2\frac{1}{2}``, ``√(x+1)`` is ``\sqrt{x+1}``; wide letters are ASCII."""
    if text.isascii():
        return text
    text = _WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), _INVISIBLE.sub("", text))
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = _RAISED.sub(lambda match: "^{" + "".join(map(_SUPERSCRIPTS.__getitem__, match[0])) + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + "".join(map(_SUBSCRIPTS.__getitem__, match[0])) + "}", text)
    text = _GREEK.sub(_greek_letter, text.translate(_TRANSLATION))
    text = _ROOT.sub(lambda match: rf"\sqrt{_ROOT_DEGREES[match[1]]}{{{_unwrapped(match[2])}}}", text)
    text = re.sub(rf"(?<=[{CJK}])(?=[\d$\\])|(?<=[\d$])(?=[{CJK}])", " ", text)
    return text


def plain_spaces(text: str) -> str:
    """Every kind of space as the common one; to be called after `plain_digits`, to which some join groups."""
    return text if text.isascii() else _SPACES.sub(" ", text)


def plain_digits(text: str) -> str:
    r"""Numbers without marks between groups of digits, where a mark can mean nothing else; one spelling of decimals.

    Example:
        >>> plain_digits(r"10\,000"), plain_digits("1.234,5"), plain_digits("0.1\\overline{6}"), plain_digits("2 3/4")
        ('10000', '1234.5', '\\frac{15}{90}', '2\\frac{3}{4}')
    """
    text = _SPACED_AND_COMMA.sub(lambda match: re.sub(r"\s|\\.", "", match[1]) + "." + match[2], text)
    text = _GROUPED.sub(lambda match: match[0].replace(match[1], ""), text)
    text = _DOT_AND_COMMA.sub(lambda match: match[1].replace(".", "") + "." + match[2], text)
    text = _DOTTED.sub(lambda match: match[1].replace(".", ""), text)
    text = _DECIMAL_BRACES.sub(lambda match: "." if _is_decimal(text, match.start()) else ",", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    mixed = _MIXED.fullmatch(text)
    if mixed and int(mixed[3][:300]) < int(mixed[4][:300]):
        text = rf"{mixed[1]}{mixed[2]}\frac{{{mixed[3]}}}{{{mixed[4]}}}"
    return _SCIENTIFIC.sub(lambda match: rf"{match[1]}\cdot 10^{{{match[2].lstrip('+')}}}", text)


def without_markdown(text: str) -> str:
    """A piece of text without Markdown's emphasis, code marks, quotes and headings around or inside it."""
    before = None
    while text != before:
        before = text
        text = _EMPHASIS.sub(lambda match: match[2], _FENCE.sub("", text))
        text = _MARKS_AFTER.sub("", _MARKS_BEFORE.sub("", text))
    return text.strip()


def without_currency(text: str) -> str:
    """An amount without its currency, which may stand before or after it."""
    if text.count("$") > 1:
        return text  # maths delimiters
    return _MONEY_AFTER.sub("", _MONEY_BEFORE.sub(r"\1", text)).strip()


def until_turn_end(text: str) -> str:
    """A model's output until the first mark of the end of its turn; all of it if nothing stands before one."""
    begin = 0
    for mark in _TURN_END.finditer(text):
        if text[begin : mark.start()].strip():
            return text[begin : mark.start()]
        begin = mark.end()
    return text[begin:]


def _greek_letter(match: re.Match[str]) -> str:
    name = unicodedata.name(match[0]).split()[-1].lower().replace("lamda", "lambda")
    return f"\\{name if match[0].islower() else name.capitalize()} "


def _vulgar_fraction(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[2]).partition("\u2044")
    return rf"{match[1]}\frac{{{over}}}{{{under}}}"


def _unwrapped(operand: str) -> str:
    return operand[1:-1] if operand[0] in "({" else operand


def _is_decimal(text: str, comma: int) -> bool:
    """Whether ``{,}`` at a place of a text divides the decimals: they are not a group of three."""
    return re.match(r"\{,\}\d{3}(?!\d)", text[comma:]) is None or text[:comma].endswith("0")


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, cycle = match[1] or "0", match[2], match[3]
    if len(whole) + len(fixed) + len(cycle) > 100:
        return match[0]
    numerator = int(whole + fixed + cycle) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(cycle) + '0' * len(fixed)}}}"
