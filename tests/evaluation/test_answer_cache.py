import multiprocessing

import pytest
import torch

from difftune.evaluation.answer_cache import AnswerCache, model_fingerprint
from difftune.evaluation.quantization import quantized_attention
from tests.evaluation.scripted import tiny_model


def test_what_was_kept_is_found_by_whoever_comes_later(tmp_path):
    path = tmp_path / "sub" / "answers.jsonl"
    first, other = AnswerCache(path), AnswerCache(path)
    assert first.get("a") is None
    first.keep("a", ["text", True])
    assert other.get("a") == AnswerCache(path).get("a") == ["text", True]
    other.keep("b", "x")
    assert first.get("b") == "x" and path.read_text().count("\n") == 2


def test_without_a_file_this_object_alone_remembers():
    cache = AnswerCache(None)
    cache.keep("a", "x")
    assert cache.get("a") == "x" and AnswerCache(None).get("a") is None


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 30, 9000])
def test_a_last_line_that_was_cut_off_is_no_answer_and_makes_room_for_the_next(tmp_path, whole, size):
    path = tmp_path / "answers.jsonl"
    before = AnswerCache(path)
    for n in range(whole):
        before.keep(str(n), "é" * 3000)
    path.touch()
    with path.open("a") as file:
        file.write('{"key": "cut", "answer": "' + "o" * size)
    cache = AnswerCache(path)
    assert cache.get("cut") is None
    cache.keep("new", "x")
    again = AnswerCache(path)
    assert again.get("new") == "x" and all(again.get(str(n)) == "é" * 3000 for n in range(whole))
    assert len(path.read_text().splitlines()) == whole + 1


def keep_many(path, who):
    cache = AnswerCache(path)
    for n in range(20):
        cache.keep(f"{who} {n}", who * 20_000)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=keep_many, args=(path, who)) for who in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    cache = AnswerCache(path)
    assert all(cache.get(f"{who} {n}") == who * 20_000 for who in "ab" for n in range(20))


def test_a_model_is_told_from_itself_with_other_weights_or_rounded_attention():
    model = tiny_model().eval()
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model().eval()) == before
    with quantized_attention(model, bits=4):
        assert model_fingerprint(model) != before
    assert model_fingerprint(model) == before
    with torch.no_grad():
        model.lm_head.weight *= 1.001
    assert model_fingerprint(model) != before
