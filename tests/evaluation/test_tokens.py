import pytest

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.tokens import token_rows

TOKENIZER = build_tokenizer("digits")


def test_documents_are_joined_and_cut_into_rows():
    rows = token_rows(TOKENIZER, ["abcd", "efg", "hij"], length=3, num_tokens=8)
    assert [TOKENIZER.decode(row) for row in rows] == ["abc", "def", "gh"]


def test_a_chat_is_rendered_as_in_training():
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    (row,) = token_rows(TOKENIZER, [chat], length=100, num_tokens=100)
    assert TOKENIZER.decode(row) == "<|user|>1+1<|assistant|>2<|eos|>"


def test_no_text_and_no_template_are_refused():
    with pytest.raises(ValueError, match="no text"):
        token_rows(TOKENIZER, [""], length=3, num_tokens=8)
    bare = build_tokenizer("digits")
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        token_rows(bare, [[{"role": "user", "content": "1"}]], length=3, num_tokens=8)
