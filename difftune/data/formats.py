r"""What the columns of a row mean: a row becomes an example to learn, or a reason to drop it.

One function a format, by name in `FORMATS`. A row that lacks a column of its format is an error; a row whose
text is empty, or that its own columns call wrong, is dropped and counted by reason.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from difftune.data.rows import BadRow

Columns = Mapping[str, Any]
Message = dict[str, str]

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Example:
    """What one row teaches: a chat whose assistant turns are learned, or a text that is learned whole."""

    messages: list[Message]
    """Turns {"role": system | user | assistant, "content": text}. Empty for a text."""
    answer: str | None = None
    """The final answer, where the data knows it."""
    id: str | None = None
    """The row's name in its data set."""
    text: str | None = None
    """A document without roles, learned from its second token to its end."""


@dataclass(frozen=True)
class Dropped:
    """Why a row is not learned."""

    reason: str
    """Beginning with "empty" or not: a row without text is bad, others are left out by what their columns say."""

    first: str | None = None
    """Of a bad row: where it is and what is wrong with it."""

    @property
    def is_bad(self) -> bool:
        """Whether the row is broken, and so a matter of `data.bad_rows`."""
        return self.reason.startswith("empty")


@dataclass(frozen=True)
class Format:
    """A way to read rows, and the columns that it is recognised by."""

    read: Callable[[Columns], Example | Dropped]
    columns: tuple[str, ...]
    """The columns that tell this format from the others; empty: never chosen by "auto". "a|b" is either."""
    absent: tuple[str, ...] = ()
    """Columns that speak against it."""

    def matches(self, columns: Columns) -> bool:
        """Whether a row with these columns could be of this format."""
        present = all(any(name in columns for name in either.split("|")) for either in self.columns)
        return bool(self.columns) and present and not any(name in columns for name in self.absent)


def resolve_format(name: str, columns: Columns, where: str) -> Format:
    """The format called `name`, or for "auto" the only one whose columns the row has.

    Raises:
        ValueError: If there is no such format, or if none or several match.
    """
    if name != "auto":
        if name not in FORMATS:
            raise ValueError(f"unknown data format {name!r}: choose auto or one of {', '.join(FORMATS)}")
        return FORMATS[name]
    matching = [key for key, candidate in FORMATS.items() if candidate.matches(columns)]
    if len(matching) != 1:
        found = f"could be any of {', '.join(matching)}" if matching else "match no known format"
        raise ValueError(
            f"{where}: the columns {', '.join(sorted(columns))} {found}; set format to one of "
            + ", ".join(f"{key} ({', '.join(f.columns) or 'question, answer'})" for key, f in FORMATS.items())
        )
    return FORMATS[matching[0]]


def read_example(row_format: Format, columns: Columns, where: str, *, answer_only: bool = False) -> Example | Dropped:
    """Read one row.

    Args:
        row_format: From `resolve_format`.
        columns: The row.
        where: Names the row in errors.
        answer_only: Replace the last assistant turn by the final answer.

    Raises:
        BadRow: If a column is missing or of the wrong type, or if `answer_only` and the format knows no
            answer.
    """
    try:
        example = row_format.read(columns)
    except ValueError as error:
        raise BadRow(where, str(error)) from error
    if isinstance(example, Example):
        _check_text(example, where)
    if isinstance(example, Dropped) or not answer_only:
        return example
    if not example.answer or not example.messages:
        raise BadRow(where, "answer_only needs the final answer, which this format does not hold")
    return replace(example, messages=[*example.messages[:-1], {"role": "assistant", "content": example.answer}])


def _check_text(example: Example, where: str) -> None:
    """Refuse half a surrogate pair: no tokenizer encodes it, and no file can hold it."""
    for text in [example.text or "", example.answer or "", *(turn["content"] for turn in example.messages)]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise BadRow(where, f"half of a surrogate pair ({half} in {text[:60]!a}): mend the text") from error


def reasoning_text(reasoning: str, solution: str) -> str:
    """The one form in which a reasoning trace is learned: the trace between think tags, then the solution."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{solution.strip()}"


def normalise_trace(text: str) -> str | None:
    """A reasoning trace in the form of `reasoning_text`, whichever delimiters it came with.

    Known are OpenThoughts' ``<|begin_of_thought|>`` family and ``<think>`` tags, whose opening tag may be
    missing (R1's chat template writes it into the prompt).

    Returns:
        None if there is no complete trace followed by a solution.
    """
    patterns = (
        r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*"
        r"<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*",
        r"\s*(?:<think>)?(.*?)</think>(.*)",
    )
    for pattern in patterns:
        if match := re.fullmatch(pattern, text, re.DOTALL):
            reasoning, solution = match[1].strip(), match[2].strip()
            return reasoning_text(reasoning, solution) if reasoning and solution else None
    return None


def read_messages(columns: Columns) -> Example | Dropped:
    """`messages`: turns of role and content; every assistant turn is learned."""
    messages = _turns(columns, "messages", "role", "content")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in messages):
        return Dropped("empty assistant turn")
    return Example(messages, id=_id(columns))


def read_prompt_completion(columns: Columns) -> Example | Dropped:
    """`prompt` and `completion`: one user turn, one assistant turn."""
    return _question_and_target(columns, "prompt", _text(columns, "completion"))


def read_text(columns: Columns) -> Example | Dropped:
    """`text`: a document, learned whole, without chat template."""
    text = _text(columns, "text")
    return Example([], id=_id(columns), text=text) if text.strip() else Dropped("empty text")


def read_openthoughts(columns: Columns) -> Example | Dropped:
    r"""`conversations` (and `correct`) of OpenThoughts-114k and open-r1/OpenThoughts-114k-math: the R1 trace.

    The reference solution of the -math set stands in `solution` and in `messages` and is *not* the target:
    `messages` is used only if it is all there is and holds a trace. Rows whose R1 answer was not verified as
    correct are dropped. The `system` column is left out, because it asks for delimiters that
    `normalise_trace` replaces.
    """
    if "correct" in columns and columns["correct"] is not True:
        return Dropped("answer not verified as correct")
    if columns.get("conversations"):
        turns = _turns(columns, "conversations", "from", "value")
    else:
        turns = _turns(columns, "messages", "role", "content")
    messages = []
    for turn in turns:
        if turn["role"] == "assistant":
            trace = normalise_trace(turn["content"])
            if trace is None:
                return Dropped("no complete reasoning trace")
            turn = {**turn, "content": trace}
        if turn["role"] != "system":
            messages.append(turn)
    return Example(messages, id=_id(columns))


def read_openthoughts_metadata(columns: Columns) -> Example | Dropped:
    """`problem`, `deepseek_reasoning`, `deepseek_solution`: configuration "metadata" of OpenThoughts-114k."""
    reasoning, solution = _text(columns, "deepseek_reasoning"), _text(columns, "deepseek_solution")
    if not reasoning.strip() or not solution.strip():
        return Dropped("no complete reasoning trace")
    return _question_and_target(columns, "problem", reasoning_text(reasoning, solution))


def read_openmathinstruct2(columns: Columns) -> Example | Dropped:
    """`problem`, `generated_solution`, `expected_answer`: nvidia/OpenMathInstruct-2."""
    answer = _text(columns, "expected_answer").strip()
    return _question_and_target(columns, "problem", _text(columns, "generated_solution"), answer)


def read_metamathqa(columns: Columns) -> Example | Dropped:
    """`query` and `response`, which ends in "The answer is: ...": meta-math/MetaMathQA."""
    response = _text(columns, "response")
    _, found, answer = response.rpartition("The answer is:")
    return _question_and_target(columns, "query", response, answer.strip() if found else None)


def read_numina(columns: Columns) -> Example | Dropped:
    """`problem` and `solution`: AI-MO/NuminaMath-CoT (whose `messages` say the same)."""
    return _question_and_target(columns, "problem", _text(columns, "solution"))


def read_question_answer(columns: Columns) -> Example | Dropped:
    r"""`question` (or `problem`) and `answer`, with the working in `solution` or in front of "####" (GSM8K).

    The target is the working, then the line "#### answer" (not where the working ends in a \boxed{} of its
    own), or the answer alone where no working is given. GSM8K's calculator marks <<3+4=7>> are taken out:
    they are calls, not language.
    """
    question = "question" if "question" in columns or "problem" not in columns else "problem"
    answer = _text(columns, "answer")
    working, marked, final = answer.rpartition("####")
    working, answer = (working, final.strip()) if marked else ("", answer.strip())
    if columns.get("solution"):
        working = _text(columns, "solution")
    working = re.sub(r"<<[^<>]*>>", "", working).strip()
    if not answer:
        return Dropped("empty answer")
    if not working or "\\boxed" in working:
        return _question_and_target(columns, question, working or answer, answer)
    return _question_and_target(columns, question, f"{working}\n#### {answer}", answer)


def read_gsm8k(columns: Columns) -> Example | Dropped:
    """As `question_answer`, but a row without working is an error: openai/gsm8k."""
    if not columns.get("solution") and "####" not in _text(columns, "answer"):
        raise ValueError('gsm8k needs the working: before "####" in answer, or in a column solution')
    return read_question_answer(columns)


def read_math(columns: Columns) -> Example | Dropped:
    r"""`problem` and `solution`, whose last \boxed{} is the answer: the MATH set."""
    solution = _text(columns, "solution")
    answer = _last_box(solution)
    return Dropped("no boxed answer") if not answer else _question_and_target(columns, "problem", solution, answer)


def read_svamp(columns: Columns) -> Example | Dropped:
    """`Body`, `Question`, `Answer`: SVAMP."""
    return _body_and_question(columns, "Body", "Question", _text(columns, "Answer"))


def read_asdiv(columns: Columns) -> Example | Dropped:
    """`body`, `question`, `answer` with its unit in brackets, such as "9 (apples)": ASDiv."""
    return _body_and_question(columns, "body", "question", re.sub(r"\s*\([^()]*\)\s*$", "", _text(columns, "answer")))


def read_calc_x(columns: Columns) -> Example | Dropped:
    """`question` and `result`: the sets of Calc-X, such as MAWPS."""
    answer = _text(columns, "result").strip()
    return _question_and_target(columns, "question", answer, answer)


def read_tabmwp(columns: Columns) -> Example | Dropped:
    """`table`, `question`, `answer`, and perhaps `table_title` and `choices`: TABMWP, asked as ToRA's harness does."""
    title = _text(columns, "table_title") if columns.get("table_title") else ""
    regarding = f' regarding "{title}"' if title else ""
    question = f"Read the following table{regarding} and answer a question:\n{_text(columns, 'table')}\n"
    question += _text(columns, "question")
    if columns.get("choices"):
        question += f" Please select from the following options: {list(columns['choices'])}"
    answer = _text(columns, "answer").strip()
    return _question_and_target({**columns, "question": question}, "question", answer, answer)


FORMATS: dict[str, Format] = {
    "messages": Format(read_messages, ("messages",), absent=("conversations", "problem")),
    "prompt_completion": Format(read_prompt_completion, ("prompt", "completion")),
    "text": Format(read_text, ("text",)),
    "question_answer": Format(read_question_answer, ("question|problem", "answer")),
    "gsm8k": Format(read_gsm8k, ()),
    "openthoughts": Format(read_openthoughts, ("conversations", "system|correct")),
    "openthoughts_metadata": Format(read_openthoughts_metadata, ("problem", "deepseek_reasoning", "deepseek_solution")),
    "openmathinstruct2": Format(read_openmathinstruct2, ("problem", "generated_solution", "expected_answer")),
    "metamathqa": Format(read_metamathqa, ("query", "response")),
    "numina": Format(read_numina, ("problem", "solution", "messages"), absent=("conversations", "answer")),
    "math": Format(read_math, ()),
    "svamp": Format(read_svamp, ("Body", "Question", "Answer")),
    "asdiv": Format(read_asdiv, ()),
    "calc_x": Format(read_calc_x, ()),
    "tabmwp": Format(read_tabmwp, ()),
}
"""Every format by name."""


def _question_and_target(columns: Columns, question: str, target: str, answer: str | None = None) -> Example | Dropped:
    prompt = _text(columns, question)
    if not prompt.strip():
        return Dropped(f"empty {question}")
    if not target.strip():
        return Dropped("empty target")
    turns = [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": target.strip()}]
    return Example(turns, answer=answer, id=_id(columns))


def _body_and_question(columns: Columns, body: str, question: str, answer: str) -> Example | Dropped:
    """A story, ended by a full stop where it has no end, and what is asked about it."""
    story = _text(columns, body).strip()
    story += "" if not story or story[-1] in ".!?" else "."
    asked = {**columns, question: f"{story} {_text(columns, question).strip()}".strip()}
    answer = re.sub(r"\.0$", "", answer.strip())
    return _question_and_target(asked, question, answer, answer)


def _last_box(text: str) -> str | None:
    r"""What the last \boxed{} of a reference holds; what a model writes needs more (`evaluation.answers`)."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : at].strip()
    return None


def _text(columns: Columns, name: str) -> str:
    """A text column; null reads as empty, numbers of an answer as their digits."""
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are {', '.join(sorted(columns))}")
    value = columns[name]
    if value is None:
        return ""
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"column {name!r} must be text or a finite number, got {value}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"column {name!r} must be text, got {type(value).__name__}")
    return value


def _turns(columns: Columns, name: str, role_key: str, content_key: str) -> list[Message]:
    """The turns of a chat column, roles by their usual names."""
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are {', '.join(sorted(columns))}")
    turns = columns[name]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {name!r} must be a list of {{{role_key}, {content_key}}}, got {turns!r:.60}")
    messages = []
    for turn in turns:
        role, content = (turn.get(role_key), turn.get(content_key)) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"a turn of {name!r} needs {role_key} (one of {', '.join(ROLES)}) and {content_key} (text), "
                f"got {turn!r:.80}"
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _id(columns: Columns) -> str | None:
    values = (columns.get(name) for name in ("id", "unique_id", "uuid"))
    return next((str(value) for value in values if value is not None), None)
