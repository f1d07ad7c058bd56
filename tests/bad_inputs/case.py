"""One wrong input: what is typed, what lies in the folder, and what the message must say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TINY = """\
seed: 0
run_dir: run
tokenizer: digits
model: {attention: diff_v1, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 128, tie_word_embeddings: true}
data:
  seq_len: 64
  micro_batch_size: 4
  train:
    - {path: "synthetic:arithmetic", options: {terms: [2, 3], operands: [1, 20], count: 100}}
optim: {lr: 3.0e-3, warmup_steps: 1}
trainer: {accelerator: cpu, devices: 1, log_every_n_steps: 1, max_steps: 3}
evaluation: {before: false, max_new_tokens: 4, batch_size: 8}
logging: {progress_bar: false, loggers: [jsonl]}
"""
"""The recipe `tiny.yaml` that every case finds in its folder: it trains in a second."""


@dataclass(frozen=True)
class Case:
    """A wrong input. It has to end with exit code 2, one message, and nothing written."""

    name: str
    argv: tuple[str, ...]
    says: tuple[str, ...]
    """What the message must hold: the value that was refused, and words of the constraint or the remedy."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Files in the working folder, by path; a path that begins with ~/ is in the home folder."""
    copies: tuple[str, ...] = ()
    """Which of the made folders stand in the working folder: `model`, `finished` (a run) or `adapter`."""
    prepare: Callable[[Path], object] | None = None
    """Changes the working folder, last."""
    env: Mapping[str, str] = field(default_factory=dict)
    as_nobody: bool = False
    """Run without root's right to write anywhere."""
    may_write: tuple[str, ...] = ()
    """Paths that may appear all the same, because the user asked for them before the fault could be known."""


def fit(name: str, *overrides: str, says: tuple[str, ...], **others: object) -> Case:
    """The tiny recipe with overrides."""
    return Case(name, ("fit", "--config", "tiny.yaml", *overrides), says, **others)  # type: ignore[arg-type]


def recipe(name: str, text: str | bytes, *, says: tuple[str, ...], **others: object) -> Case:
    """A recipe file of its own."""
    return Case(name, ("fit", "--config", "bad.yaml"), says, files={"bad.yaml": text}, **others)  # type: ignore[arg-type]


def with_line(line: str) -> str:
    """The tiny recipe and a line more."""
    return TINY + line + "\n"
