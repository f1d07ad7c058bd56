r"""What the columns of a row mean: a row becomes an example to learn, or a reason to drop it.

One function a format, by name in `FORMATS`. A row that lacks a column of its format is an error; a row whose
text is empty, or that its own columns call wrong, is dropped and counted by reason.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from difftune.data.chat_formats import (
    normalise_trace,
    read_alpaca,
    read_conversations,
    read_generations,
    read_messages,
    read_openorca,
    read_openthoughts,
    read_openthoughts_metadata,
    read_preferences,
    read_prompt_completion,
    reasoning_text,
)
from difftune.data.examples import Columns, Dropped, Example, question_and_target, row_id, text_of
from difftune.data.rows import BadRow

__all__ = ["Columns", "Dropped", "Example", "normalise_trace", "reasoning_text"]  # also looked for here


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
    for text in [
        example.text or "",
        example.answer or "",
        *(turn["content"] for turn in example.messages),
        *(turn.get("reasoning_content", "") for turn in example.messages),
    ]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise BadRow(where, f"half of a surrogate pair ({half} in {text[:60]!a}): mend the text") from error


def read_text(columns: Columns) -> Example | Dropped:
    """`text`: a document, learned whole, without chat template."""
    text = text_of(columns, "text")
    return Example([], id=row_id(columns), text=text) if text.strip() else Dropped("empty text")


def read_openmathinstruct2(columns: Columns) -> Example | Dropped:
    """`problem`, `generated_solution`, `expected_answer`: nvidia/OpenMathInstruct-2."""
    answer = text_of(columns, "expected_answer").strip()
    return question_and_target(columns, "problem", text_of(columns, "generated_solution"), answer)


def read_metamathqa(columns: Columns) -> Example | Dropped:
    """`query` and `response`, which ends in "The answer is: ...": meta-math/MetaMathQA."""
    response = text_of(columns, "response")
    _, found, answer = response.rpartition("The answer is:")
    return question_and_target(columns, "query", response, answer.strip() if found else None)


def read_numina(columns: Columns) -> Example | Dropped:
    """`problem` and `solution`: AI-MO/NuminaMath-CoT (whose `messages` say the same)."""
    return question_and_target(columns, "problem", text_of(columns, "solution"))


def read_question_answer(columns: Columns) -> Example | Dropped:
    r"""`question` (or `problem`) and `answer`, with the working in `solution` or in front of "####" (GSM8K).

    The target is the working, then the line "#### answer" (not where the working ends in a \boxed{} of its
    own), or the answer alone where no working is given. GSM8K's calculator marks <<3+4=7>> are taken out:
    they are calls, not language.
    """
    question = "question" if "question" in columns or "problem" not in columns else "problem"
    answer = text_of(columns, "answer")
    working, marked, final = answer.rpartition("####")
    working, answer = (working, final.strip()) if marked else ("", answer.strip())
    if columns.get("solution"):
        working = text_of(columns, "solution")
    working = re.sub(r"<<[^<>]*>>", "", working).strip()
    if not answer:
        return Dropped("empty answer")
    if not working or "\\boxed" in working:
        return question_and_target(columns, question, working or answer, answer)
    return question_and_target(columns, question, f"{working}\n#### {answer}", answer)


def read_gsm8k(columns: Columns) -> Example | Dropped:
    """As `question_answer`, but a row without working is an error: openai/gsm8k."""
    if not columns.get("solution") and "####" not in text_of(columns, "answer"):
        raise ValueError('gsm8k needs the working: before "####" in answer, or in a column solution')
    return read_question_answer(columns)


def read_math(columns: Columns) -> Example | Dropped:
    r"""`problem` and `solution`, whose last \boxed{} is the answer: the MATH set."""
    solution = text_of(columns, "solution")
    answer = _last_box(solution)
    return Dropped("no boxed answer") if not answer else question_and_target(columns, "problem", solution, answer)


def read_svamp(columns: Columns) -> Example | Dropped:
    """`Body`, `Question`, `Answer`: SVAMP."""
    return _body_and_question(columns, "Body", "Question", text_of(columns, "Answer"))


def read_asdiv(columns: Columns) -> Example | Dropped:
    """`body`, `question`, `answer` with its unit in brackets, such as "9 (apples)": ASDiv."""
    return _body_and_question(columns, "body", "question", re.sub(r"\s*\([^()]*\)\s*$", "", text_of(columns, "answer")))


def read_calc_x(columns: Columns) -> Example | Dropped:
    """`question` and `result`: the sets of Calc-X, such as MAWPS."""
    answer = text_of(columns, "result").strip()
    return question_and_target(columns, "question", answer, answer)


def read_tabmwp(columns: Columns) -> Example | Dropped:
    """`table`, `question`, `answer`, and perhaps `table_title` and `choices`: TABMWP, asked as ToRA's harness does."""
    title = text_of(columns, "table_title") if columns.get("table_title") else ""
    regarding = f' regarding "{title}"' if title else ""
    question = f"Read the following table{regarding} and answer a question:\n{text_of(columns, 'table')}\n"
    question += text_of(columns, "question")
    if columns.get("choices"):
        question += f" Please select from the following options: {list(columns['choices'])}"
    answer = text_of(columns, "answer").strip()
    return question_and_target({**columns, "question": question}, "question", answer, answer)


FORMATS: dict[str, Format] = {
    "messages": Format(read_messages, ("messages",), absent=("conversations", "problem", "chosen")),
    "conversations": Format(read_conversations, ("conversations",), absent=("correct", "problem", "chosen")),
    "alpaca": Format(read_alpaca, ("instruction", "output|response"), absent=("messages", "conversations", "chosen")),
    "openorca": Format(read_openorca, ("question", "response", "system_prompt")),
    "preferences": Format(read_preferences, ("chosen", "rejected")),
    "generations": Format(read_generations, ("generations",), absent=("messages", "conversations")),
    "prompt_completion": Format(read_prompt_completion, ("prompt", "completion")),
    "text": Format(read_text, ("text",)),
    "question_answer": Format(read_question_answer, ("question|problem", "answer"), absent=("generations",)),
    "gsm8k": Format(read_gsm8k, ()),
    "openthoughts": Format(read_openthoughts, ("conversations", "correct|problem")),
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


def _body_and_question(columns: Columns, body: str, question: str, answer: str) -> Example | Dropped:
    """A story, ended by a full stop where it has no end, and what is asked about it."""
    story = text_of(columns, body).strip()
    story += "" if not story or story[-1] in ".!?" else "."
    asked = {**columns, question: f"{story} {text_of(columns, question).strip()}".strip()}
    answer = re.sub(r"\.0$", "", answer.strip())
    return question_and_target(asked, question, answer, answer)


def _last_box(text: str) -> str | None:
    r"""What the last \boxed{} of a reference holds; what a model writes needs more (`evaluation.answers`)."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : at].strip()
    return None
