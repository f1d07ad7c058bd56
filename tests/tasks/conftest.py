"""A small model on disk, and the command line on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from difftune import cli
from difftune.data.tokenizers import build_tokenizer
from tests.evaluation.scripted import tiny_model

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(vocab_size=262, hidden_size=16, max_position_embeddings=4096).save_pretrained(folder)
    build_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(model_folder: Path, tmp_path: Path) -> Evaluate:
    """Run `difftune evaluate` with more arguments; the figures by task name."""

    def run(*arguments: str) -> dict[str, Any]:
        command = ["evaluate", "--model", str(model_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert cli.main([*command, *arguments]) == 0
        tasks: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
        return tasks

    return run
