import pytest
from transformers import PreTrainedTokenizerBase

from difftune.data.tokenizers import build_tokenizer


@pytest.fixture(scope="session")
def digits() -> PreTrainedTokenizerBase:
    return build_tokenizer("digits")


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer("bytes")
