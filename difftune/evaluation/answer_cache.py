"""What was answered once, kept on disk: a JSON object a line, and by what two states of a model are told apart."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock


class AnswerCache:
    """Answers by key in a file that grows by whole lines, whichever of several processes adds them.

    Args:
        path: The file, made with its folder when something is kept. None: nothing is, but for this object.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._answers: dict[str, Any] = {}
        self._read = 0
        self._lock = threading.RLock()

    def get(self, key: str) -> Any:
        """What was kept under a key, also by another process since; None if nothing was."""
        with self._lock:
            if key not in self._answers and self.path is not None and self.path.is_file():
                with self.path.open("rb") as file:
                    file.seek(self._read)
                    # A last line without an end was cut off by a crash, or is being written: no answer yet.
                    lines = [line for line in file if line.endswith(b"\n")]
                self._read += sum(map(len, lines))
                for entry in _entries(lines):
                    self._answers[entry["key"]] = entry["answer"]
            return self._answers.get(key)

    def keep(self, key: str, answer: Any) -> None:
        """Add an answer, and have it on disk when this returns.

        Args:
            key: Under which it is found again.
            answer: Plain values, as JSON has them, but None.
        """
        assert answer is not None, "None says that nothing was kept"
        with self._lock:
            self._answers[key] = answer
            if self.path is not None:
                self._append(self.path, key, answer)

    def _append(self, path: Path, key: str, answer: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with FileLock(path.with_name(f"{path.name}.lock")), path.open("ab+") as file:
            file.truncate(_whole_bytes(file))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The entries of a file, without lines that a power cut left damaged: their questions are asked again."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"key", "answer"} <= entry.keys():
            yield entry


def _whole_bytes(file: Any) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """A hash of what a model says to some tokens: of its weights, and of all that changes what it computes.

    Args:
        model: A causal language model of transformers' kind, in evaluation mode.
    """
    tokens = torch.arange(64, device=next(model.parameters()).device)[None] % model.config.vocab_size
    logits = model(input_ids=tokens).logits
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()[:16]
