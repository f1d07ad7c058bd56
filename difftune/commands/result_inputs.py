"""What the results of `difftune evaluate --out` are of: everything that would change a figure."""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from difftune import __version__
from difftune.checkpoints.content import model_content
from difftune.config import Config
from difftune.config.checks import task_defaults
from difftune.data.tokenizers import tokenizer_fingerprint
from difftune.evaluation.task import Task
from difftune.fingerprints import files_hash, path_hash, value_hash

_RUN_TIME = ("dtype", "attention_backend", "quantization")
_NOT_COMPUTED = {"batch_size", "max_batch_tokens", "chunk_size", "cache", "cache_dir", "failure"}
"""Fields of tasks that change how long they take and not what they find."""


def describe_inputs(config: Config, tasks: Sequence[Task[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What an evaluation is of, for `ResultFolder.open`: model, tokenizer, code, and under `tasks` each of them.

    Args:
        config: With `model.path`.
        tasks: Of the config, built: what they ask is taken from them and not from the files where it stood.
        tokenizer: Of the model.
    """
    assert config.model.path is not None, "checked with the config"
    defaults = {name: value for name, value in vars(task_defaults(config.evaluation)).items() if name != "batch_size"}
    settings = {}
    for task, given in zip(tasks, config.evaluation.tasks, strict=True):
        keys = {name: value for name, value in dataclasses.asdict(given).items() if name not in _NOT_COMPUTED}
        settings[task.name] = {**keys, "defaults": defaults, "data": task_content(task), "files": _files_of(keys)}
    return {
        "model": config.model.path,
        **{f"model's {name}": value for name, value in model_content(config.model.path).items()},
        **{name: getattr(config.model, name) for name in _RUN_TIME},
        **_tokenizer_content(tokenizer),
        "difftune's evaluation": _code(),
        "tasks": settings,
    }


def task_content(task: Task[Any]) -> str:
    """A hash of all that a task asks: problems, texts, demonstrations, limits; not of how it batches them."""
    return value_hash(_asked(task))


def _asked(task: Any) -> dict[str, Any]:
    # A task may run another one, at lower precision for one.
    fields = {name: value for name, value in vars(task).items() if name not in _NOT_COMPUTED}
    return {name: _asked(value) if hasattr(value, "run_block") else value for name, value in fields.items()}


def _files_of(keys: dict[str, Any]) -> dict[str, str]:
    """Of what a task reads only while it runs: a judge's model, definitions of tasks."""
    named = {name: keys.get(name) for name in ("nli_model", "include_path")}
    return {name: path_hash(path) for name, path in named.items() if path and Path(path).exists()}


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = None
        rest = tokenizer_fingerprint(tokenizer)
    finally:
        tokenizer.chat_template = template
    return {"tokenizer": rest, "chat template": value_hash(template)}


def _code() -> str:
    """Of what asks and grades: another version may grade the same answer otherwise."""
    package = Path(__file__).parents[1]
    try:
        grader = version("math-verify")
    except PackageNotFoundError:
        grader = "none"
    hashed = files_hash(package, [package / "rendering.py", *(package / "evaluation").rglob("*.py")])
    return f"difftune {__version__}, math-verify {grader}, {hashed[:16]}"
