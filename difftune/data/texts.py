"""Long texts to measure on: files, data sets with a text column, or prose made on the spot."""

import random
from collections.abc import Iterator
from pathlib import Path

from difftune.data.sources import Source, read_rows

PROSE = "synthetic:prose"

_PEOPLE = (
    "the baker|a young sailor|my neighbour|the old clockmaker|our teacher|a quiet traveller|the gardener|her cousin"
)
_ACTIONS = "painted|carried home|wrote about|forgot|repaired|sold|found|described|counted|admired|borrowed|drew"
_THINGS = (
    "a wooden boat|the red lantern|three letters|an empty basket|the stone bridge|a map of the coast|the last apple"
)
_PLACES = "near the harbour|behind the mill|under a grey sky|at the edge of the wood|in the long corridor|by the river"
_TIMES = "On Monday|Late in autumn|Before the rain|Some years ago|In the early morning|After supper|That winter|At noon"
_ENDS = "and nobody noticed|because the wind had turned|although it was late|while the others slept|and then went on"


def load_texts(
    path: str,
    *,
    column: str = "text",
    split: str = "test",
    name: str | None = None,
    limit: int | None = None,
    characters: int = 100_000,
    seed: int = 0,
) -> list[str]:
    """Read texts, one a document.

    Args:
        path: A .txt file, a folder of .txt files (a document each, by name), a .jsonl, .json or .parquet file, a folder
            of these, a hub id, or `synthetic:prose`, sentences drawn from a small grammar.
        column: The column with the text, where there are columns.
        split: Split of a hub data set or folder.
        name: Configuration of a hub data set.
        limit: At most this many, the first ones. None: all; of prose, one.
        characters: Least length of a document of prose.
        seed: Of the prose.

    Raises:
        ValueError: If nothing can be read, a row lacks the column, or there is no text in it.
    """
    if path == PROSE:
        return [" ".join(_sentences(characters, f"{seed} {index}")) for index in range(limit or 1)]
    file = Path(path).expanduser()
    plain = [file] if file.suffix == ".txt" and file.is_file() else []
    if file.is_dir():
        plain = sorted(file.glob("*.txt"))
    if plain:
        texts = [_read_text(path) for path in plain[:limit]]
    else:
        texts = []
        for row in read_rows(Source(path=path, split=split, name=name, limit=limit)):
            text = row.columns.get(column)
            if not isinstance(text, str):
                raise ValueError(
                    f"{row.where}: no text in column {column!r}; there are {', '.join(sorted(row.columns))}: set column"
                )
            texts.append(text)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} has no text")
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}): save it as UTF-8") from error


def join_texts(texts: list[str], characters: int) -> list[str]:
    """Texts joined in their order, with a blank line between them, to documents of at least so many characters.

    What is left over at the end is too little for a document and left out, unless it is all there is.
    """
    documents: list[str] = []
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text) + 2
        if size - 2 >= characters:
            documents.append("\n\n".join(waiting))
            waiting, size = [], 0
    return documents or ["\n\n".join(waiting)]


def _sentences(characters: int, seed: str) -> Iterator[str]:
    draw = random.Random(seed)
    lists = [words.split("|") for words in (_TIMES, _PEOPLE, _ACTIONS, _THINGS, _PLACES, _ENDS)]
    total = 0
    while total < characters:
        when, who, did, what, where, end = (draw.choice(words) for words in lists)
        sentence = f"{when} {who} {did} {what} {where}, {end}."
        total += len(sentence) + 1
        yield sentence
