import random
import re

import pytest
from transformers import PreTrainedTokenizerBase

from difftune.data.texts import load_texts
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.haystack import CITIES, Haystack, Needles, draw_needles, question

TEXT = load_texts("synthetic:prose", characters=4000)
ONE = Needles({"Oslo": "1234567"}, ["Oslo"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer("bytes")


def prompt_text(tokenizer: PreTrainedTokenizerBase, needles: Needles, depth: float, prompt: str = "plain") -> str:
    haystack = Haystack(TEXT, tokenizer, 1500, prompt)
    ids = haystack.build(random.Random(0), needles, length=1500, depth=depth, answer_tokens=30)
    assert len(ids) == 1470, "prompt and answer together are as long as was asked for"
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize(("depth", "low", "high"), [(0, 0, 0.02), (0.25, 0.15, 0.25), (0.75, 0.65, 0.75), (1, 1, 1)])
def test_the_needle_stands_behind_a_full_stop_at_its_depth(
    tokenizer: PreTrainedTokenizerBase, depth: float, low: float, high: float
) -> None:
    text = prompt_text(tokenizer, ONE, depth)
    before, after = text.split("\nThe special magic Oslo number is: 1234567\n")
    context = before.removeprefix("You are a helpful assistant. USER: ")
    rest, asked = after.split(" What is the special magic number for Oslo?")
    assert asked == " Don't give information outside the document. ASSISTANT:"
    assert low <= len(context) / (len(context) + len(rest)) <= high
    assert depth in (0, 1) or context.endswith(".")


def test_all_needles_are_hidden_and_only_the_first_one_s_place_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    needles = draw_needles(random.Random(3), 6, 2)
    assert len(needles.queried) == 2 and list(needles.numbers)[:2] == needles.queried
    text = prompt_text(tokenizer, needles, 1.0)
    found = re.findall(r"\nThe special magic (\w+) number is: (\d{7})\n", text)
    assert dict(found) == needles.numbers and len(found) == 6
    assert found[-1][0] == needles.queried[0]


def test_questions_name_all_that_is_asked_for() -> None:
    assert question(["Oslo"]) == "What is the special magic number for Oslo?"
    assert question(["Oslo", "Rome"]) == "What are the special magic numbers for Oslo and Rome?"
    assert question(["Oslo", "Rome", "Lima"]) == "What are the special magic numbers for Oslo, Rome, and Lima?"


def test_a_completion_ends_with_the_needle_s_own_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompt_text(tokenizer, ONE, 0.5, "completion").endswith("\nThe special magic Oslo number is:")


def test_a_chat_puts_text_and_question_into_the_user_s_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    text = prompt_text(tokenizer, ONE, 0.5, "chat")
    assert text.startswith("<|user|>") and "1234567\n" in text and text.endswith("outside the document.<|assistant|>")
    assert "\x02" not in text
    bare = build_tokenizer("bytes")
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: set prompt=plain"):
        prompt_text(bare, ONE, 0.5, "chat")


def test_cities_cannot_be_taken_for_one_another() -> None:
    assert len(set(CITIES)) == len(CITIES) > 80
    assert not [(a, b) for a in CITIES for b in CITIES if a != b and b.startswith(a)]


def test_what_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"the haystack has \d+ tokens, and a prompt of 9000 is asked for: give more"):
        Haystack(TEXT, tokenizer, 9000, "plain")
    haystack = Haystack(TEXT, tokenizer, 200, "plain")
    with pytest.raises(
        ValueError, match="1 needles, the question and an answer of 30 tokens need more than 180 tokens"
    ):
        haystack.build(random.Random(0), ONE, length=180, depth=0, answer_tokens=30)
