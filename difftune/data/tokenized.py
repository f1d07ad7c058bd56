"""A source as token ids: tokenised piece by piece, in flat arrays."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from difftune.data.bad_rows import read_row, refuse_or_drop
from difftune.data.chat import Encoded, TeacherRows, encode_examples
from difftune.data.formats import Dropped, Example, Format, resolve_format
from difftune.data.mapped import part
from difftune.data.rows import BadRow, Row
from difftune.data.sources import Source, read_rows

PIECE_ROWS = 512
ARRAYS = {
    "ids": np.int32,
    "learned": np.bool_,
    "offsets": np.int64,
    "questions": np.uint64,
    "row_numbers": np.int64,
    "label_counts": np.int64,
    "last_ids": np.int32,
}
"""Type of each array of a `TokenizedSet`."""
OF_TOKENS = ("ids", "learned")
"""Those with an entry a token, read document by document; all others are read whole."""


@dataclass
class Counts:
    """What happened to the rows of a source before their length was looked at."""

    rows_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by the reason for which they are not learned."""
    unknown_tokens: int = 0
    """Tokens that are the tokenizer's unknown token: text that the model cannot see."""
    first_bad: dict[str, str] = field(default_factory=dict)
    """Of each reason for which bad rows are dropped, the first row: where it is and what is wrong with it."""

    def drop(self, dropped: Dropped) -> None:
        """Count a row that is not learned."""
        self.dropped[dropped.reason] += 1
        if dropped.first is not None:
            self.first_bad.setdefault(dropped.reason, dropped.first)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows_read + other.rows_read,
            self.dropped + other.dropped,
            self.unknown_tokens + other.unknown_tokens,
            other.first_bad | self.first_bad,
        )


@dataclass(frozen=True)
class StoredTeacher:
    """What a teacher said to the label tokens of every document of a set, one after another in flat arrays."""

    arrays: TeacherRows
    """Of all documents together."""
    offsets: np.ndarray
    """int64, shape [documents + 1]: where the rows of each document begin."""

    def rows(self, document: int) -> TeacherRows:
        """Those of one document, as views."""
        start, end = int(self.offsets[document]), int(self.offsets[document + 1])
        return TeacherRows(*(part(array, start, end) for array in self.arrays))


@dataclass(frozen=True)
class TokenizedSet:
    """Documents one after another in flat arrays, whole (no length limit is applied yet)."""

    source: str
    """Path of the source."""
    ids: np.ndarray
    """int32, all tokens of all documents."""
    learned: np.ndarray
    """bool, for each token whether it is a label."""
    offsets: np.ndarray
    """int64, shape [documents + 1]: where each document begins."""
    questions: np.ndarray
    """uint64, shape [documents]: `question_key` of the user turn before each document's last answer."""
    row_numbers: np.ndarray
    """int64, shape [documents]: the row of the source, from 1, that each document was."""
    label_counts: np.ndarray
    """int64, shape [documents]: labels of each document, so that counting them reads no tokens."""
    last_ids: np.ndarray
    """int32, shape [documents]: the last token of each."""
    counts: Counts
    teacher: StoredTeacher | None = None
    """What a teacher said to the documents, if that is stored and asked for."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64, shape [documents]: tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Encoded:
        """One document, as views."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        teacher = None if self.teacher is None else self.teacher.rows(index)
        return Encoded(part(self.ids, start, end), part(self.learned, start, end), teacher)


def question_key(text: str) -> int:
    """64 bits that stand for a question, blind to white space: finds evaluation problems in training rows."""
    return int.from_bytes(hashlib.blake2b("".join(text.split()).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Piece:
    """Some hundred rows in a row of a source, read and not yet tokenised."""

    rows: list[Row]
    start: int
    """Number of the first of them in the source, from 1."""
    row_format: Format | None
    """None: no row up to here can be read."""

    def tokenize(self, source: Source, tokenizer: PreTrainedTokenizerBase) -> TokenizedSet:
        """What its rows become; a function of the piece alone."""
        return _tokenize(self.rows, self.start, source, self.row_format, tokenizer)


def read_pieces(source: Source, *, streaming: bool = False, skip_rows: int = 0) -> Iterator[Piece]:
    """Read a source in its own order, a few hundred rows at a time.

    Args:
        source: What to read.
        streaming: As in `read_rows`.
        skip_rows: Leave out the first so many, a multiple of a piece.
    """
    rows = read_rows(source, streaming=streaming, keep_bad=True)
    row_format: Format | None = None
    start = 1
    while part := list(islice(rows, PIECE_ROWS)):
        if row_format is None and (first := next((row for row in part if row.bad is None), None)):
            row_format = resolve_format(source.format, first.columns, first.where)
        if start > skip_rows:
            yield Piece(part, start, row_format)
        start += len(part)


def tokenize_pieces(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, streaming: bool = False
) -> Iterator[TokenizedSet]:
    """Tokenise a source in its own order, a few hundred rows at a time."""
    for piece in read_pieces(source, streaming=streaming):
        yield piece.tokenize(source, tokenizer)


def _tokenize(
    rows: Sequence[Row], start: int, source: Source, row_format: Format | None, tokenizer: PreTrainedTokenizerBase
) -> TokenizedSet:
    counts = Counts(rows_read=len(rows))
    kept: list[tuple[int, Row, Example]] = []
    for number, row in enumerate(rows, start):
        example = read_row(row, row_format, source)
        if isinstance(example, Dropped):
            counts.drop(example)
        else:
            kept.append((number, row, example))
    try:
        documents = _encode(kept, tokenizer)
    except ValueError:
        # One row or several cannot be encoded; which, only each alone can say.
        kept = [one for one in kept if not _dropped(one, source, tokenizer, counts)]
        documents = _encode(kept, tokenizer)
    ids = np.concatenate([np.empty(0, np.int32), *(document.ids for document in documents)])
    if tokenizer.unk_token_id is not None:
        counts.unknown_tokens = int(np.count_nonzero(ids == tokenizer.unk_token_id))
    return TokenizedSet(
        source=source.path,
        ids=ids,
        learned=np.concatenate([np.empty(0, np.bool_), *(document.learned for document in documents)]),
        offsets=np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64),
        questions=np.asarray([_question(kept[one.example][2], one.turn) for one in documents], dtype=np.uint64),
        row_numbers=np.asarray([kept[one.example][0] for one in documents], dtype=np.int64),
        label_counts=np.asarray([np.count_nonzero(document.learned) for document in documents], dtype=np.int64),
        last_ids=np.asarray([document.ids[-1] for document in documents], dtype=np.int32),
        counts=counts,
    )


def _encode(rows: list[tuple[int, Row, Example]], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return encode_examples(tokenizer, [example for _, _, example in rows], [row.where for _, row, _ in rows])


def _dropped(one: tuple[int, Row, Example], source: Source, tokenizer: PreTrainedTokenizerBase, counts: Counts) -> bool:
    """Whether a row cannot be encoded and is dropped, which is counted; other faults than of the row are raised."""
    where = f"{one[1].where}: "
    try:
        _encode([one], tokenizer)
    except ValueError as error:
        if not str(error).startswith(where):
            raise
        counts.drop(refuse_or_drop(BadRow(one[1].where, str(error).removeprefix(where)), source))
        return True
    return False


def _question(example: Example, turn: int | None) -> int:
    asked = [message["content"] for message in example.messages[:turn] if message["role"] == "user"]
    return question_key(asked[-1] if asked else example.text or "")
