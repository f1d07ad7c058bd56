"""Which files of a path hold the rows of a split: by suffix, by the words of their names, and what is left out."""

import logging
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

log = logging.getLogger(__name__)

COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Codecs of pyarrow by suffix."""
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
READABLE = f"{', '.join(FILE_SUFFIXES)}; the text ones also as {', '.join(COMPRESSION)}"

_SAVED = ("state.json", "dataset_dict.json")
_DESCRIPTIONS = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|(readme|license|licence|notice)\b.*|.*\.md", re.I
)
_HELD_OUT = {
    "test": "test|tests|testing|testset|testdata|testsplit|eval|evals|evaluation|evaluations|evalset|heldout|holdout",
    "validation": "validation|validationset|valid|validset|val|valset|dev|devset|development",
}
_GROUPS = {word: group for group, words in _HELD_OUT.items() for word in words.split("|")}
_GROUPS |= dict.fromkeys(("train", "training", "trainset", "traindata", "trainsplit"), "train")
_TWO_WORDS = {("held", "out"): "heldout", ("hold", "out"): "holdout"}


def is_saved_dataset(path: Path) -> bool:
    """Whether this is a folder that `save_to_disk` of `datasets` wrote."""
    return path.is_dir() and any((path / name).is_file() for name in _SAVED)


def kind_of_file(path: Path) -> tuple[str, str | None] | None:
    """Suffix that says how a file is read, and the codec it is compressed with; None: it cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    codec = COMPRESSION.get(suffixes[-1]) if suffixes else None
    suffix = suffixes[-1] if codec is None and suffixes else suffixes[-2] if len(suffixes) > 1 else ""
    if suffix not in (TEXT_SUFFIXES if codec else FILE_SUFFIXES):
        return None
    return suffix, codec


def data_files(path: Path, split: str) -> list[Path]:
    """The data files of a path, in the order of their names.

    Of a folder those of the split, its subfolders `data` and those named as a split included. A file or subfolder whose
    name has a word for held-out data (test, eval, validation, dev, heldout, ...) never is of the split train. Files
    that no word assigns to a split are of every split, unless others are of the one that is asked for. What is not
    read is named in a warning.

    Raises:
        ValueError: If there is none, or the file is of another kind.
    """
    if path.is_file():
        if kind_of_file(path) is None:
            raise ValueError(
                f"{path} must be a data file ({READABLE}), got suffix {''.join(path.suffixes[-2:])!r}; unpack an "
                "archive, or convert the file"
            )
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} must be a file or a folder")
    found, unread = _walk(path)
    if not found:
        others = f"; it holds {_some(unread)}" if unread else ""
        raise ValueError(
            f"{path} holds no data file ({READABLE}){others}. Of subfolders only `data` and those named as a split are "
            "searched: name another one as the path"
        )
    # A file under a second name would be learned twice.
    first = {file.resolve(): file for file in reversed(found)}
    unread += [str(file.relative_to(path)) for file in found if first[file.resolve()] != file]
    found = [file for file in found if first[file.resolve()] == file]
    splits = {file: split_of(file.relative_to(path)) for file in found}
    wanted = _GROUPS.get(split.lower(), split.lower())
    exact = [file for file in found if split.lower() in _words(file.relative_to(path)) and splits[file] != "train"]
    chosen = exact if wanted != "train" else []
    chosen = chosen or [file for file in found if splits[file] == wanted]
    if not chosen and (wanted == "train" or not any(splits.values())):
        chosen = [file for file in found if splits[file] is None]
    if not chosen:
        names = ", ".join(str(file.relative_to(path)) for file in found)
        raise ValueError(f"{path} holds no file of the split {split!r}: found {names}; set split, or name one file")
    left_out = [str(file.relative_to(path)) for file in found if file not in chosen]
    _warn(str(path), split, tuple(unread), tuple(left_out))
    return chosen


def split_of(name: Path) -> str | None:
    """The split that the words of a relative path speak of: train, test or validation. Held-out words win over train.

    Example:
        >>> split_of(Path("train_test_split_test.jsonl")), split_of(Path("latest.jsonl"))
        ('test', None)
    """
    groups = {_GROUPS[word] for word in _words(name) if word in _GROUPS}
    return next((group for group in ("test", "validation", "train") if group in groups), None)


def _words(name: Path) -> list[str]:
    """Whole words of a path, lower case: also those of camelCase, and `held_out` as one."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name))
    words = [word.lower() for word in re.split(r"[^A-Za-z]+", spaced) if word]
    return words + [_TWO_WORDS[pair] for pair in pairwise(words) if pair in _TWO_WORDS]


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Data files of a folder and the subfolders that are searched, and the names of what is not read."""
    found: list[Path] = []
    unread: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or _DESCRIPTIONS.fullmatch(entry.name):
            continue
        if entry.is_dir():
            if not entry.is_symlink() and (entry.name.lower() == "data" or split_of(Path(entry.name))):
                inner, others = _walk(entry)
                found += inner
                unread += [f"{entry.name}/{name}" for name in others]
            else:
                unread.append(f"{entry.name}/")
        elif entry.is_file() and kind_of_file(entry) is not None:
            found.append(entry)
        else:
            unread.append(entry.name)
    return found, unread


@lru_cache(maxsize=256)
def _warn(path: str, split: str, unread: tuple[str, ...], left_out: tuple[str, ...]) -> None:
    """Once for each folder: it is asked for its files several times."""
    if unread:
        log.warning(
            "%s: not read, since these are no data files, or others by a second name: %s", path, _some(list(unread))
        )
    if left_out:
        log.warning("%s: not read, since these are not of the split %s: %s", path, split, _some(list(left_out)))


def _some(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
