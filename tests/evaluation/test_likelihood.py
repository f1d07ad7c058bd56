import itertools
import logging
import math

import pytest
import torch

from difftune.evaluation.likelihood import Reader, token_nll, warn_if_too_long
from difftune.evaluation.task import Clock
from difftune.modeling import DiffTransformerForCausalLM
from tests.evaluation.scripted import tiny_model

NEVER = Clock(None, None)
KINDS = ["diff_v1", "diff_v2", "softmax"]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> DiffTransformerForCausalLM:
    return tiny_model(request.param, num_key_value_heads=2).double().eval()


def score(model: torch.nn.Module, prefix: list[int], continuation: list[int]) -> float:
    """Log-likelihood by one forward without a cache."""
    ids = torch.tensor([prefix + continuation])
    logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[len(prefix) - 1 + at, token].item() for at, token in enumerate(continuation))


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100])
def test_chunks_with_the_cache_give_what_one_forward_gives(model: DiffTransformerForCausalLM, chunk_size: int) -> None:
    ids = torch.randint(6, 102, (33,))
    nll = token_nll(model, ids, chunk_size=chunk_size)
    whole = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    assert nll is not None and nll.shape == (32,)
    # The model computes in float64, the last step in float32.
    torch.testing.assert_close(nll, whole.float(), atol=4e-6, rtol=4e-6)


@torch.no_grad()
def test_no_more_logits_than_those_of_a_chunk_are_held(model: DiffTransformerForCausalLM) -> None:
    widths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    token_nll(model, torch.randint(6, 102, (50,)), chunk_size=8)
    hook.remove()
    assert widths == [8, 8, 8, 8, 8, 8, 1]


def test_without_time_there_is_no_likelihood() -> None:
    polls = iter([False, False, True])
    clock = Clock(lambda: next(polls), None)
    with torch.no_grad():
        assert token_nll(tiny_model(), torch.arange(6, 46), chunk_size=10, clock=clock) is None


@torch.no_grad()
@pytest.mark.parametrize("max_batch_tokens", [1, 75, 16384])
def test_the_most_likely_continuation_is_that_of_scoring_all_without_the_cache(
    model: DiffTransformerForCausalLM, max_batch_tokens: int
) -> None:
    prefix, end = torch.randint(6, 102, (20,)).tolist(), 9
    labels = [[*word, end] for word in ([20], [20, 21], [20, 21, 22], [30, 31], [40], [41, 20, 21, 50, 51])]
    reader = Reader(model, chunk_size=6, clock=NEVER, max_batch_tokens=max_batch_tokens)
    reader.read(prefix)
    for query in ([60], [61, 62, 63], torch.randint(6, 102, (15,)).tolist()):
        expected = [score(model, prefix + query, label) for label in labels]
        found = reader.most_likely(query, labels)
        assert found is not None
        index, value = found
        assert index == max(range(len(labels)), key=expected.__getitem__)
        assert value == pytest.approx(expected[index], abs=4e-5)
        assert reader.ids == prefix, "the prefix is as it was, for the next query"
    # Each of them alone: whatever the model thinks of the others.
    for label, expected in zip(labels, [score(model, [*prefix, 60], label) for label in labels], strict=True):
        assert reader.most_likely([60], [label]) == (0, pytest.approx(expected, abs=4e-5))


@torch.no_grad()
@pytest.mark.parametrize(("max_batch_tokens", "rows", "calls"), [(1, 43, 43), (16384, 120, 12)])
def test_what_cannot_win_is_not_read_and_the_rest_together(max_batch_tokens: int, rows: int, calls: int) -> None:
    model = tiny_model(initializer_range=1.0).eval()
    labels = [list(label) for label in itertools.product(range(10, 16), repeat=3)]
    reader = Reader(model, chunk_size=64, clock=NEVER, max_batch_tokens=max_batch_tokens)
    read: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: read.append(len(output)))
    found = reader.most_likely([7, 8], labels)
    hook.remove()
    assert found is not None and labels[found[0]] == max(labels, key=lambda label: score(model, [7, 8], label))
    assert sum(read) < rows < 216 and len(read) < calls


@torch.no_grad()
def test_what_leaves_no_choice_is_read_at_once() -> None:
    model = tiny_model().double().eval()
    labels = [[20, *range(30, 50)], [21, *range(50, 70)]]
    reader = Reader(model, chunk_size=64, clock=NEVER, max_batch_tokens=1)
    widths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    found = reader.most_likely([7, 8], labels)
    hook.remove()
    expected = [score(model, [7, 8], label) for label in labels]
    assert found == (expected.index(max(expected)), pytest.approx(max(expected), abs=4e-5))
    assert widths == [1, 20, 20], "the question, then each label without its last token"


@torch.no_grad()
def test_a_reader_whose_time_is_over_says_so_and_forgets_what_it_began() -> None:
    polls = iter([False, False, True, True])
    reader = Reader(tiny_model().eval(), chunk_size=4, clock=Clock(lambda: next(polls), None))
    assert reader.read([6, 7, 8]) is not None
    assert reader.most_likely([9, 10, 11, 12, 13, 14], [[20]]) is None
    assert reader.ids == [6, 7, 8]


@torch.no_grad()
def test_log_probabilities_are_of_the_token_that_comes_next() -> None:
    model = tiny_model().eval()
    reader = Reader(model, chunk_size=2, clock=NEVER)
    reader.read([6, 7, 8, 9])
    reader.back_to(3)
    after = reader.read([10])
    assert after is not None and math.isclose(after.exp().sum().item(), 1, rel_tol=1e-5)
    expected = model(torch.tensor([[6, 7, 8, 10]])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def test_a_length_beyond_the_models_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(max_position_embeddings=100)
    with caplog.at_level(logging.WARNING):
        warn_if_too_long(model, "books", 100)
        assert not caplog.records
        warn_if_too_long(model, "books", 101)
    assert "books reaches 101 tokens, beyond max_position_embeddings (100)" in caplog.text
