from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.attention_calls import AttentionCall
from difftune.evaluation.attention_noise import PAPER, NoiseTask, group_shares, last_row, locate, picture
from tests.evaluation.scripted import tiny_model

TOKENIZER = build_tokenizer("digits")
S = 5


@dataclass
class Fact:
    context: str = "abc def Qk57 ghi jkl"
    query: str = "Qk"
    needle: str = "Qk57"
    value: str = "57"
    lead: str = ""
    depth: float = 0.5


def planted_call(first: list[float], second: list[float] | None, lam: torch.Tensor | None) -> AttentionCall:
    """One row, one head, whose last query has exactly these softmax maps: keys are unit vectors."""
    maps = [first] if second is None else [first, second]
    q = torch.stack([torch.tensor(m).log() * S**0.5 for m in maps])  # (pair, D)
    q = q.expand(S, -1, -1)[None, :, None] if second is not None else q.expand(S, -1)[None, :, None]
    keys = torch.eye(S)[None, :, None]
    k = keys[:, :, :, None].expand(-1, -1, -1, 2, -1) if second is not None else keys
    return AttentionCall(0, q, k, torch.zeros(1, S, 1, S), lam, None, None)


FIRST, SECOND = [0.1, 0.4, 0.2, 0.2, 0.1], [0.2, 0.05, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("lam", [torch.tensor(0.5), torch.tensor([0.5]), torch.full((1, S, 1), 0.5)])
def test_a_planted_difference_has_its_known_shares(lam):
    row = last_row(planted_call(FIRST, SECOND, lam))
    torch.testing.assert_close(row, torch.tensor([[0.0, 0.375, 0.075, 0.075, -0.025]]))
    answer, noise = torch.tensor([0, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 1, 1, 1]).bool()
    shares = group_shares(row, torch.stack([answer, noise]))
    torch.testing.assert_close(shares, torch.tensor([[0.375 / 0.55, 0.175 / 0.55]]))


def test_a_planted_map_of_the_baseline_has_its_known_shares():
    row = last_row(planted_call(FIRST, None, None))
    groups = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    torch.testing.assert_close(group_shares(row, groups), torch.tensor([[0.4, 0.5]]))


def test_what_both_maps_have_in_common_is_not_noise_of_the_difference():
    # The second map is flat, a fifth everywhere, and half of it is the noise of the first.
    row = last_row(planted_call([0.1, 0.6, 0.1, 0.1, 0.1], [0.2] * 5, torch.tensor(0.5)))
    groups = torch.tensor([[0, 1, 0, 0, 0], [1, 0, 1, 1, 1]]).bool()
    assert group_shares(row, groups)[0, 0] > 0.999


def test_tokens_of_answer_and_noise_are_found_in_the_prompt():
    tokens, answer, noise = locate(TOKENIZER, Fact())
    text = [TOKENIZER.decode([token]) for token in tokens]
    assert "".join(t for t, is_answer in zip(text, answer, strict=True) if is_answer) == "57"
    assert "".join(t for t, is_noise in zip(text, noise, strict=True) if is_noise) == "abc def  ghi jkl"
    assert text[0] == "<|user|>" and text[-1] == "<|assistant|>"
    led, *_ = locate(TOKENIZER, Fact(lead="Qk"))
    assert led == [*tokens, *TOKENIZER("Qk")["input_ids"]]


@pytest.mark.parametrize("fact", [Fact(needle="Zz99", value="99"), Fact(context="Qk57 Qk57"), Fact(value="7Z")])
def test_a_fact_that_is_not_there_once_is_refused(fact):
    with pytest.raises(ValueError, match="exactly once"):
        locate(TOKENIZER, fact)


def test_a_tokenizer_without_template_is_refused():
    bare = build_tokenizer("digits")
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        locate(bare, Fact())


def test_the_picture_of_a_head_holds_both_maps_and_their_difference():
    torch.manual_seed(0)
    q, k = torch.randn(1, 9, 4, 2, 8), torch.randn(1, 9, 2, 2, 8)
    call = AttentionCall(1, q, k, torch.zeros(1, 9, 2, 16), torch.full((1, 9, 4), 0.25), None, None)
    maps = picture(call, 3)
    first, second, difference = (torch.tensor(maps[name]) for name in ("first", "second", "difference"))
    torch.testing.assert_close(first.sum(-1), torch.ones(9), atol=1e-3, rtol=0)
    torch.testing.assert_close(difference, first - 0.25 * second, atol=2e-4, rtol=0)
    logit = (q[0, 8, 3, 0] @ k[0, :, 1, 0].T) * 8**-0.5
    torch.testing.assert_close(first[8], logit.softmax(-1), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="0 to 3, got 4"):
        picture(call, 4)


def test_a_long_map_is_pooled_to_what_is_largest_in_magnitude():
    call = planted_call(FIRST, None, None)
    q = torch.zeros(1, 200, 1, 4)
    maps = picture(AttentionCall(0, q, q, q, None, None, None), 0)
    assert len(maps["first"]) == 64 and maps["first"][0][0] == 1.0 and "second" not in maps
    assert len(picture(call, 0)["first"]) == S


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax"])
def test_the_task_measures_every_prompt_and_goes_on_from_what_was_done(kind):
    facts = [Fact(depth=depth) for depth in (0, 0.25, 0.5, 0.75, 1)]
    task = NoiseTask("noise", facts, pictures=2)
    model = tiny_model(kind)
    samples = task.run(model, TOKENIZER)
    result = task.summarise(samples)
    assert result.complete and sorted(s.index for s in samples if s.maps) == [0, 1]
    metrics = result.metrics()
    assert 0 < metrics["answer"] < 1 and 0 < metrics["noise"] < 1 and metrics["answer"] + metrics["noise"] < 1
    assert metrics["answer"] == pytest.approx((metrics["answer_layer_00"] + metrics["answer_layer_01"]) / 2)
    assert metrics["signal_to_noise"] == pytest.approx(metrics["answer"] / metrics["noise"])
    console = Console(width=120, record=True)
    console.print(*result.tables())
    assert f"{PAPER['diff_v1']['answer'][4]:.2f}" in console.export_text()
    again = task.run(model, TOKENIZER, done=samples[:4])
    assert again[:4] == samples[:4] and again[4] == samples[4]
    partial = task.summarise(samples[:2])
    assert not partial.complete and len(partial.row()) == 4 and "2 prompts" in str(partial)


def test_no_prompt_no_layer_no_sample():
    with pytest.raises(ValueError, match="no prompt"):
        NoiseTask("noise", [])
    with pytest.raises(ValueError, match="one of the model's 2, got 5"):
        NoiseTask("noise", [Fact()], layer=5).run(tiny_model(), TOKENIZER)
    empty = NoiseTask("noise", [Fact()]).summarise([])
    assert empty.tables() == [] and empty.to_dict()["answer"] is None
