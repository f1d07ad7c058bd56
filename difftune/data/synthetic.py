r"""Problems with a graded difficulty and a worked solution, made on the spot: the teacher of the quickstart.

`synthetic:arithmetic` draws chains such as ``12+7-15``. A row has the columns

* ``question``: ``12+7-15``
* ``solution``: one step a line, ``12+7=19`` then ``19-15=4`` (products first, then from left to right)
* ``answer``: ``4``

and is learned as the format `question_answer` says: the solution, then the line ``#### 4``, so that the final
answer is what stands after ``####``, as in GSM8K. With `answer_only` the target is ``4`` alone.

Train and test never share a problem: the split is a function of the problem itself (a hash of its canonical
form, in which ``3+5-2`` and ``5-2+3`` are the same), one tenth of all problems being test.

`synthetic:needles` hides facts in noise and asks for them, see `difftune.data.needles`.
`synthetic:reasoning_gym/<task>` wraps a task of the reasoning_gym library (question and answer, no solution). Both are
split by a hash of the question.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import count as count_from
from typing import Any

from difftune.data.needles import draw_needles

_MAX_TERMS = 1000
_MAX_OPERAND = 10**12
LEVELS: dict[int, dict[str, Any]] = {
    1: {"terms": (2, 2), "operands": (1, 9), "operators": "+-"},
    2: {"terms": (2, 3), "operands": (1, 20), "operators": "+-"},
    3: {"terms": (3, 4), "operands": (1, 50), "operators": "+-"},
    4: {"terms": (3, 4), "operands": (1, 20), "operators": "+-*"},
    5: {"terms": (4, 6), "operands": (1, 99), "operators": "+-*"},
}
"""Difficulty 1 (easiest) to 5; each setting can be given on its own."""

SPLITS = ("train", "test")
_GYM = "reasoning_gym/"
_FRUITLESS_DRAWS = 2000


def generate(generator: str, split: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield `count` different problems, the same ones at every call.

    Args:
        generator: "arithmetic", "needles" or "reasoning_gym/<task>".
        split: "train" or "test"; no problem is in both, whatever the other settings are.
        options: `count` (default 20,000) and `seed` (default 0) for both. For arithmetic also `level` (1 to
            5, default 2) and what it stands for: `terms` [fewest, most], `operands` [lowest, highest] (whole
            numbers >= 0), `operators` (some of "+-*"). Everything else in `options` goes to the task of
            reasoning_gym.

    Yields:
        Rows with `id`, `question`, `answer` and, for arithmetic, `solution`.

    Raises:
        ValueError: If a setting is unknown or out of range, or if it allows fewer than `count` different
            problems.
        ImportError: If reasoning_gym is asked for and not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split of synthetic:{generator} must be one of {', '.join(SPLITS)}, got {split!r}")
    options = dict(options)
    count = _whole_number("count", options.pop("count", 20_000), low=1)
    seed = _whole_number("seed", options.pop("seed", 0), low=0)
    if generator == "arithmetic":
        candidates = _arithmetic(random.Random(f"{seed} {split}"), **_checked(options))
    elif generator == "needles":
        rows = draw_needles(random.Random(f"{seed} {split}"), options)
        candidates = ((row["question"], row) for row in rows)
    elif generator.startswith(_GYM):
        candidates = _reasoning_gym(generator.removeprefix(_GYM), seed, options)
    else:
        raise ValueError(f"unknown generator {generator!r}: choose arithmetic, needles or {_GYM}<task>")
    return _distinct(candidates, generator, split, count)


def version(generator: str) -> str:
    """What, besides this file, decides the rows of a generator: the version of the library behind it."""
    if not generator.startswith(_GYM):
        return ""
    _import_reasoning_gym(generator)
    return metadata.version("reasoning_gym")


def split_of(canonical: str) -> str:
    """The split that a problem belongs to, by its canonical form: one tenth is "test"."""
    return "test" if _hash(canonical) % 10 == 0 else "train"


def canonical_chain(numbers: list[int], operators: list[str]) -> str:
    """One spelling for all orders of the same chain: factors sorted in each term, then the signed terms.

    Example:
        >>> canonical_chain([5, 2, 3], ["-", "+"]) == canonical_chain([3, 5, 2], ["+", "-"])
        True
    """
    terms = [("+", [numbers[0]])]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            terms[-1][1].append(number)
        else:
            terms.append((operator, [number]))
    return "".join(sorted(sign + "*".join(map(str, sorted(factors))) for sign, factors in terms))


def work_out(numbers: list[int], operators: list[str]) -> tuple[int, list[str]]:
    """The value of a chain and its steps, one operation each: products first, then from left to right.

    Example:
        >>> work_out([5, 3, 4], ["-", "*"])
        (-7, ['3*4=12', '5-12=-7'])
    """
    numbers, operators, steps = list(numbers), list(operators), []
    while operators:
        at = operators.index("*") if "*" in operators else 0
        left, right, operator = numbers[at], numbers[at + 1], operators.pop(at)
        value = {"+": left + right, "-": left - right, "*": left * right}[operator]
        steps.append(f"{left}{operator}{right}={value}")
        numbers[at : at + 2] = [value]
    return numbers[0], steps


def _arithmetic(
    rng: random.Random, terms: tuple[int, int], operands: tuple[int, int], operators: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless draws: canonical form and row."""
    while True:
        numbers = [rng.randint(*operands) for _ in range(rng.randint(*terms))]
        chain = [rng.choice(operators) for _ in numbers[1:]]
        value, steps = work_out(numbers, chain)
        question = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(chain, numbers[1:], strict=True))
        row = {"question": question, "answer": str(value), "solution": "\n".join(steps)}
        yield canonical_chain(numbers, chain), row


def _reasoning_gym(task: str, seed: int, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    reasoning_gym = _import_reasoning_gym(f"{_GYM}{task}")
    try:
        # Items are made one at a time when indexed, so the size only has to be large enough.
        problems = reasoning_gym.create_dataset(task, size=2**31, seed=seed, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning_gym task {task!r} with {config or 'its defaults'}: {error}") from error
    for index in count_from():
        item = problems[index]
        yield item["question"], {"question": item["question"], "answer": str(item["answer"])}


def _import_reasoning_gym(generator: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"synthetic:{generator} needs reasoning_gym: pip install reasoning-gym") from error
    return reasoning_gym


def _distinct(
    candidates: Iterable[tuple[str, dict[str, Any]]], generator: str, split: str, count: int
) -> Iterator[dict[str, Any]]:
    """The first `count` candidates of the split, each question once."""
    seen: set[int] = set()
    fruitless = 0
    for canonical, row in candidates:
        key = _hash(row["question"])
        if split_of(canonical) != split or key in seen:
            fruitless += 1
            if fruitless == _FRUITLESS_DRAWS:
                raise ValueError(
                    f"synthetic:{generator} found only {len(seen)} different {split} problems with these "
                    f"settings, {count} were asked for: lower count, or widen terms, operands or operators"
                )
            continue
        fruitless = 0
        seen.add(key)
        yield {"id": f"{generator}-{split}-{len(seen) - 1}", **row}
        if len(seen) == count:
            return


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the arithmetic generator, complete and in range."""
    level = options.pop("level", 2)
    if level not in LEVELS:
        raise ValueError(f"level of synthetic:arithmetic must be one of {sorted(LEVELS)}, got {level!r}")
    settings = dict(LEVELS[level])
    if unknown := sorted(set(options) - set(settings)):
        known = ", ".join(["count", "seed", "level", *settings])
        raise ValueError(f"unknown options {unknown} of synthetic:arithmetic: choose from {known}")
    settings.update(options)
    for name, low, high in (("terms", 2, _MAX_TERMS), ("operands", 0, _MAX_OPERAND)):
        pair = settings[name]
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name} of synthetic:arithmetic must be [lowest, highest], got {pair!r}")
        settings[name] = tuple(_whole_number(name, bound, low=low, high=high) for bound in pair)
        if settings[name][0] > settings[name][1]:
            raise ValueError(f"{name} of synthetic:arithmetic must be [lowest, highest], got {list(pair)}")
    operators = settings["operators"]
    if not isinstance(operators, str) or not operators or set(operators) - set("+-*"):
        raise ValueError(f'operators of synthetic:arithmetic must be some of "+-*", got {operators!r}')
    return settings


def _whole_number(name: str, value: Any, *, low: int, high: int = 10**12) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} of a synthetic source must be a whole number, at least {low}, got {value!r}")
    if value > high:
        raise ValueError(f"{name} of a synthetic source must be at most {high}, got {value!r}")
    return value


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
