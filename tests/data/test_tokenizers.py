import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from difftune.data.tokenizers import SPECIAL_TOKENS, build_tokenizer, require_same_tokens, tokenizer_fingerprint

CHAT = [{"role": "user", "content": "12+7"}, {"role": "assistant", "content": "19"}]
TEXT = "12+7=19\n#### 19 \\boxed{x_1}"


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_each_character_is_a_token_of_the_digit_tokenizer(digits):
    assert len(ids(digits, TEXT)) == len(TEXT)
    assert digits.decode(ids(digits, TEXT)) == TEXT
    assert len(digits) == 102 == max(digits.get_vocab().values()) + 1


def test_each_byte_is_a_token_of_the_byte_tokenizer(byte_tokenizer):
    text = "Čas 世界 🙂\n\t x  y\x00 don't" + TEXT
    assert len(ids(byte_tokenizer, text)) == len(text.encode())
    assert byte_tokenizer.decode(ids(byte_tokenizer, text)) == text
    assert len(byte_tokenizer) == 262


@pytest.mark.parametrize("name", ["digits", "bytes"])
def test_special_tokens_are_apart_from_each_other_and_from_text(name):
    tokenizer = build_tokenizer(name)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert tokenizer.decode(ids(tokenizer, "<|user|>1<|eos|>"), skip_special_tokens=True) == "1"


@pytest.mark.parametrize("name", ["digits", "bytes"])
def test_chat_costs_three_tokens_beyond_its_text(name):
    tokenizer = build_tokenizer(name)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|user|>12+7<|assistant|>19<|eos|>"
    assert len(ids(tokenizer, text)) == len("12+7") + len("19") + 3
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>")


@pytest.mark.parametrize("name", ["digits", "bytes"])
def test_saved_and_reloaded_by_transformers_is_the_same(name, tmp_path):
    tokenizer = build_tokenizer(name)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), build_tokenizer(str(tmp_path))):
        assert ids(loaded, TEXT) == ids(tokenizer, TEXT)
        assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def bare(tmp_path, **special) -> str:
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    return str(tmp_path)


def test_loaded_tokenizer_without_padding_token_gets_one(tmp_path):
    assert build_tokenizer(bare(tmp_path, eos_token="<s>", unk_token="<unk>")).pad_token == "<unk>"
    assert build_tokenizer(bare(tmp_path / "2", eos_token="<s>")).pad_token == "<s>"


def test_tokenizer_without_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no eos_token: a model cannot learn to stop"):
        build_tokenizer(bare(tmp_path))


def test_unknown_name_and_empty_folder_are_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"tokenizer 'digit' could not be loaded: choose digits, bytes.*no such folder"
    ):
        build_tokenizer("digit")
    with pytest.raises(ValueError, match="it is a folder without a tokenizer"):
        build_tokenizer(str(tmp_path))


def test_chat_template_can_be_replaced(digits):
    tokenizer = build_tokenizer("digits", chat_template="{{ messages[0]['content'] }}!")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "12+7!"
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(digits)


def test_fingerprint_ignores_the_settings_of_the_last_call():
    tokenizer = build_tokenizer("bytes")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before != tokenizer_fingerprint(build_tokenizer("digits"))


def test_tokens_are_compared_by_content():
    """Another object, another name and more tokens are the same; one moved token is not."""
    student, teacher = build_tokenizer("digits"), build_tokenizer("digits")
    teacher.add_tokens(["<more>"])
    require_same_tokens(student, teacher, "t")
    with pytest.raises(
        ValueError, match=r"the teacher t has another .* 1 of 103 .* such as '<more>' \(102, there unknown"
    ):
        require_same_tokens(teacher, student, "t")
    with pytest.raises(ValueError, match="choose a teacher with the student's tokenizer"):
        require_same_tokens(student, build_tokenizer("bytes"), "t")
