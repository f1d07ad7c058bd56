import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from difftune.data.chat import encode_examples
from difftune.data.formats import Example
from difftune.data.tokenizers import build_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + END + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*contents: str) -> Example:
    roles = ("user", "assistant") * len(contents)
    return Example([{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)])


def encode(tokenizer, example: Example):
    return encode_examples(tokenizer, [example], ["rows.jsonl, line 7"])[0]


def learned_text(tokenizer, document) -> str:
    return tokenizer.decode(document.ids[document.learned].tolist())


def with_template(template: str):
    return build_tokenizer("bytes", chat_template=template)


def test_the_answer_and_the_end_are_learned_and_nothing_else(digits):
    document = encode(digits, chat("12+7", "19"))
    assert digits.decode(document.ids.tolist()) == "<|user|>12+7<|assistant|>19<|eos|>"
    assert learned_text(digits, document) == "19<|eos|>"
    assert document.ids.dtype == np.int32 and document.learned.dtype == bool


def test_every_assistant_turn_is_learned(digits):
    document = encode(digits, chat("1+1", "2", "2+2", "4"))
    assert learned_text(digits, document) == "2<|eos|>4<|eos|>"


def test_mask_is_what_follows_the_generation_prompt():
    tokenizer = with_template(CHATML.replace("END", "'<|im_end|>'"))
    document = encode(tokenizer, chat("12+7", "19"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+7"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(document.ids[~document.learned].tolist()) == prompt


def test_end_is_added_where_the_template_writes_none():
    tokenizer = with_template(CHATML.replace("END", "'<|im_end|>'"))
    document = encode(tokenizer, chat("12+7", "19"))
    assert learned_text(tokenizer, document) == "19<|im_end|>\n<|eos|>"


def test_white_space_after_the_end_is_left_out():
    tokenizer = with_template(CHATML.replace("END", "eos_token"))
    document = encode(tokenizer, chat("12+7", "19"))
    assert document.ids[-1] == tokenizer.eos_token_id
    assert learned_text(tokenizer, document) == "19<|eos|>"


def test_end_is_learned_even_if_padding_is_the_same_token():
    tokenizer = build_tokenizer("digits")
    tokenizer.pad_token = tokenizer.eos_token
    document = encode(tokenizer, chat("12+7", "19"))
    assert document.ids[-1] == tokenizer.eos_token_id and document.learned[-1]


def test_turns_after_the_last_answer_are_left_out(digits):
    document = encode(digits, chat("1+1", "2", "thanks"))
    assert digits.decode(document.ids.tolist()).endswith("2<|eos|>")


def test_row_without_an_assistant_turn_is_an_error_that_names_the_row(digits):
    with pytest.raises(ValueError, match=r"rows.jsonl, line 7: no label to learn"):
        encode(digits, chat("12+7"))


def test_template_that_rewrites_earlier_turns_makes_several_documents():
    forgetful = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = with_template(forgetful)
    assert learned_text(tokenizer, encode(tokenizer, chat("12+7", "<think>a</think>19"))).startswith("<think>")
    documents = encode_examples(tokenizer, [chat("1", "2"), chat("12+7", "<think>a</think>19", "1+1", "2")], ["", ""])
    assert [learned_text(tokenizer, document) for document in documents] == [
        "2<|eos|>",
        "<think>a</think>19<|eos|>",
        "2<|eos|>",
    ]
    assert tokenizer.decode(documents[2].ids.tolist()) == "<|user|>12+7<|assistant|>19<|user|>1+1<|assistant|>2<|eos|>"
    assert [(document.example, document.turn) for document in documents] == [(0, 1), (1, 1), (1, 3)]


def test_token_across_the_border_of_prompt_and_answer_is_an_error():
    vocabulary = {token: index for index, token in enumerate(["<s>", "a", ":", "b", ":b"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[(":", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}:{% endif %}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", chat_template=template)
    assert encode(tokenizer, chat("a", "a")).ids.tolist() == [1, 2, 1, 0]
    with pytest.raises(ValueError, match="line 7: a token of the answer reaches back into the prompt 'a:'"):
        encode(tokenizer, chat("a", "b"))


def test_character_outside_the_vocabulary_is_an_error_that_names_row_and_text(digits):
    examples, where = [chat("1", "1"), chat("é", "2")], ["line 1", "line 2"]
    with pytest.raises(ValueError, match=r"line 2: the tokenizer has no token for 'é'.*bytes"):
        encode_examples(digits, examples, where)


def test_tokenizer_without_chat_template_is_an_error_for_chats_only():
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.*chat_template\.jinja"):
        encode(tokenizer, chat("1", "2"))
    assert len(encode(tokenizer, Example([], text="ab")).ids) == 3


@pytest.mark.parametrize(
    ("frame", "expected"),
    [(None, "ab<|eos|>"), ("<|bos|> $A", "<|bos|>ab<|eos|>"), ("<|bos|> $A <|eos|>", "<|bos|>ab<|eos|>")],
)
@pytest.mark.parametrize("text", ["ab", "ab<|eos|>", "<|bos|>ab"])
def test_text_begins_as_its_tokenizer_begins_one_and_ends_once(frame, expected, text):
    tokenizer = build_tokenizer("bytes")
    if frame is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[("<|bos|>", 1), ("<|eos|>", 2)]
        )
    elif text.startswith("<|bos|>"):
        expected = f"<|bos|>{expected}"
    document = encode(tokenizer, Example([], text=text))
    assert tokenizer.decode(document.ids.tolist()) == expected
    assert document.learned.tolist() == [False] + [True] * (len(document.ids) - 1)


def test_many_rows_at_once_are_the_same_as_one_by_one(byte_tokenizer):
    examples = [chat("1", "2"), Example([], text="x"), chat("a", "b", "c", "dd")]
    together = encode_examples(byte_tokenizer, examples, ["", "", ""])
    for document, example in zip(together, examples, strict=True):
        alone = encode(byte_tokenizer, example)
        assert document.ids.tolist() == alone.ids.tolist()
        assert document.learned.tolist() == alone.learned.tolist()


def test_first_token_is_never_learned():
    tokenizer = build_tokenizer("bytes")
    tokenizer.bos_token = None
    assert encode(tokenizer, Example([], text="abc")).learned.tolist() == [False, True, True, True]


def test_row_that_begins_with_an_answer_is_an_error(digits):
    with pytest.raises(ValueError, match="line 7: the row begins with an assistant turn"):
        encode(digits, Example([{"role": "assistant", "content": "abc"}]))


def test_row_that_the_template_refuses_is_named():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="line 7: the chat template refuses the row: roles must alternate"):
        encode(tokenizer, chat("1", "2"))
