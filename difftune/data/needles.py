"""Facts hidden in noise, and questions about them: the teacher and the examiner of retrieval.

`synthetic:needles` writes a context of filler in which some facts stand, each a key with a number of its own, and asks
for the numbers of some of the keys. Rows have the columns `question` (context and query), `answer`, and where the first
number asked for is to be found: `context`, `query`, `needle` (the fact), `value` (the number), `depth`, and `lead`
(what of the answer stands before the number). Two styles:

* ``prose``: sentences, such as "The special magic number of Lisbon is 4821.", for models that read English; the answer
  is the number, or numbers with commas between them
* ``terse``: characters, such as "Q5 k7 R3", for models of minutes, where each character is a token: a capital and its
  number is a fact, a small letter and a number is filler. The query is one key, the answer its fact and then, where R
  is more than 1, other facts: much to learn from one context, by the simplest of circuits, which looks for what stands
  before and copies what comes next. Ask for one to examine.

The protocol is that of Gemini 1.5 and LWM, which the paper follows: of N facts, R are asked for; the first of these
stands at a chosen depth, the others at random places.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, section 3.4.
"""

import random
import string
from collections.abc import Iterator
from typing import Any

_CITIES = """
Amman Athens Bergen Berlin Bogota Boston Cairo Calgary Chicago Dakar Delhi Dublin Geneva Hanoi Havana Helsinki Jakarta
Kyoto Lagos Lima Lisbon London Lusaka Madrid Manila Milan Minsk Moscow Nairobi Naples Osaka Oslo Paris Prague Quito Riga
Rome Seoul Sofia Sydney Taipei Tehran Tokyo Toronto Tunis Vienna Warsaw Zagreb
"""
CITIES = _CITIES.split()
"""Keys of the prose style."""

_SUBJECTS = ("The river", "An old road", "The market", "A quiet train", "The morning wind", "The long winter")
_VERBS = ("turns towards", "stands near", "remembers", "leads away from", "lies behind", "is older than")
_OBJECTS = ("the hills", "the harbour", "the station", "the bridge", "the northern wall", "the gardens", "the mill")

DEFAULTS: dict[str, Any] = {
    "style": "prose",
    "needles": 4,
    "queries": 1,
    "filler": 40,
    "digits": 4,
    "depth": None,
}
"""`needles` N; `queries` R, or [fewest, most]; `filler` sentences (prose) or pairs (terse); `digits` of a number;
`depth` of the first answer as a share of the context, or null: anywhere."""


def draw_needles(rng: random.Random, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Endless rows.

    Args:
        rng: Where the draws come from.
        options: See `DEFAULTS`.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """
    settings = _checked(options)
    while True:
        yield _row(rng, **settings)


def _row(
    rng: random.Random,
    style: str,
    needles: int,
    queries: tuple[int, int],
    filler: int,
    digits: int,
    depth: float | None,
) -> dict[str, Any]:
    prose = style == "prose"
    keys = rng.sample(CITIES if prose else string.ascii_uppercase, needles)
    # Numbers differ, so that a right one cannot be a wrong needle's.
    values = [str(value) for value in rng.sample(range(10 ** (digits - 1), 10**digits), needles)]
    facts = [_fact(prose, key, value) for key, value in zip(keys, values, strict=True)]
    asked = min(rng.randint(*queries), needles)
    pieces = [_filler(rng, prose, digits) for _ in range(filler)]
    depth = rng.random() if depth is None else depth
    places = [round(depth * filler)] + [rng.randint(0, filler) for _ in facts[1:]]
    # At its place the first fact stands outermost: depth 0 is the very beginning, depth 1 the very end.
    rank = 0 if depth < 0.5 else needles
    order = sorted(range(needles), key=lambda index: (places[index], index or rank))
    for index in reversed(order):
        pieces.insert(places[index], facts[index])
    context = " ".join(pieces)
    names = keys[:asked]
    lead = "" if prose else names[0]
    if prose:
        listed = names[0] if asked == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        query = f"What {'is the special magic number' if asked == 1 else 'are the special magic numbers'} of {listed}?"
    else:
        query = names[0]
    return {
        "question": f"{context}\n{query}",
        "answer": ",".join(values[:asked]) if prose else " ".join(facts[:asked]),
        "context": context,
        "query": query,
        "needle": facts[0],
        "value": values[0],
        "lead": lead,
        "depth": depth,
    }


def _fact(prose: bool, key: str, value: str) -> str:
    return f"The special magic number of {key} is {value}." if prose else f"{key}{value}"


def _filler(rng: random.Random, prose: bool, digits: int) -> str:
    if prose:
        return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}."
    return f"{rng.choice(string.ascii_lowercase)}{rng.randrange(10 ** (digits - 1), 10**digits)}"


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(options) - set(DEFAULTS)):
        known = ", ".join(["count", "seed", *DEFAULTS])
        raise ValueError(f"unknown options {unknown} of synthetic:needles: choose from {known}")
    settings = {**DEFAULTS, **options}
    if settings["style"] not in ("prose", "terse"):
        raise ValueError(f"style of synthetic:needles must be prose or terse, got {settings['style']!r}")
    most = len(CITIES) if settings["style"] == "prose" else len(string.ascii_uppercase)
    for name, low, high in (("needles", 1, most), ("filler", 0, None), ("digits", 1, 9)):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{name} of synthetic:needles must be a whole number, {limits}, got {value!r}")
    if settings["needles"] > 9 * 10 ** (settings["digits"] - 1):
        raise ValueError(
            f"synthetic:needles: there are not {settings['needles']} different numbers of {settings['digits']} digit(s)"
        )
    queries = settings["queries"]
    pair = (
        [queries, queries] if isinstance(queries, int) else list(queries) if isinstance(queries, list | tuple) else []
    )
    whole = len(pair) == 2 and all(isinstance(bound, int) and not isinstance(bound, bool) for bound in pair)
    if not whole or not 1 <= pair[0] <= pair[1] <= settings["needles"]:
        raise ValueError(
            f"queries of synthetic:needles must be a number from 1 to needles ({settings['needles']}), or "
            f"[fewest, most], got {queries!r}"
        )
    settings["queries"] = (pair[0], pair[1])
    depth = settings["depth"]
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1):
        raise ValueError(f"depth of synthetic:needles must be a share of the context, 0 to 1, or null, got {depth!r}")
    return settings
