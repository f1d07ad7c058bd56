import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from difftune.checkpoints.compare import RELATIVE_BUDGET, StreamedModel, compare, probe_rows, text_rows
from difftune.checkpoints.streams import in_order
from tests.checkpoints.llamas import each_kind, logits, make_llama, token_ids


def streamed(model: torch.nn.Module) -> StreamedModel:
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return StreamedModel(type(model), model.config, in_order(tensors))


@each_kind
def test_a_streamed_model_has_the_logits_of_the_whole(model_type: str, changes) -> None:
    model, ids = make_llama(model_type, **changes), token_ids(2, 30)
    hidden, head = streamed(model).run(ids)
    torch.testing.assert_close(hidden @ head.T, logits(model, ids), rtol=0, atol=1e-5)


def test_the_figures_are_those_of_their_definitions() -> None:
    before, after = make_llama(), make_llama()
    rows = {"one": token_ids(2, 40).tolist(), "two": token_ids(1, 25).tolist()}
    found = compare(streamed(before), streamed(after), rows)
    assert [(d.inputs, d.tokens) for d in found] == [("one", 80), ("two", 25)]
    for difference, own in zip(found, rows.values(), strict=True):
        ids = torch.tensor(own)
        old, new = logits(before, ids), logits(after, ids)
        assert difference.max_abs_logit == pytest.approx((new - old).abs().max().item(), rel=1e-4)
        assert difference.logit_scale == pytest.approx(old.abs().max().item(), rel=1e-4)
        kl = F.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        assert difference.kl == pytest.approx(kl.item(), rel=1e-4)
        assert difference.same_top == pytest.approx((old.argmax(-1) == new.argmax(-1)).float().mean().item())
        for value, of in ((difference.nll_before, old), (difference.nll_after, new)):
            loss = F.cross_entropy(of[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            assert value == pytest.approx(loss.item(), rel=1e-4)
        assert not difference.within_budget and difference.to_dict()["budget"] == difference.budget


def test_rows_longer_than_a_chunk_lose_no_label() -> None:
    model = make_llama(max_position_embeddings=512)
    ids = token_ids(1, 300)
    (found,) = compare(streamed(model), streamed(model), {"long": ids.tolist()})
    loss = F.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:])
    assert found.nll_before == found.nll_after == pytest.approx(loss.item(), rel=1e-4)
    assert found.max_abs_logit == 0 and found.kl == 0 and found.same_top == 1 and found.within_budget


def test_nan_is_never_within_budget() -> None:
    model, broken = make_llama(), make_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    (found,) = compare(streamed(model), streamed(broken), {"x": token_ids(1, 200).tolist()})
    assert math.isnan(found.max_abs_logit) and not found.within_budget
    small = dataclasses.replace(found, max_abs_logit=0.0, logit_scale=0.1)
    assert small.budget == RELATIVE_BUDGET and small.within_budget


def test_rows_fit_the_model() -> None:
    assert probe_rows(61, 32) == probe_rows(61, 32) and [len(row) for row in probe_rows(61, 32)] == [32, 32]
    assert max(max(row) for row in probe_rows(61, 64)) < 61
    assert [len(row) for row in text_rows(list(range(1000)), 64, 150)] == [64, 64, 22]
    assert [i for row in text_rows(list(range(1000)), 4096, 2048) for i in row] == list(range(1000))
