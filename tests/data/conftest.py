import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from difftune.data.tokenizers import build_tokenizer


@pytest.fixture(scope="session")
def digits() -> PreTrainedTokenizerBase:
    return build_tokenizer("digits")


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer("bytes")


@pytest.fixture
def write_jsonl(tmp_path: Path):
    def write(rows: list[dict], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
