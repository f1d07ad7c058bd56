import pytest
import torch
from torch import nn

from difftune.evaluation.attention_calls import attention_calls
from difftune.modeling import attention as attention_module
from tests.evaluation.scripted import tiny_model

KINDS = ["diff_v1", "diff_v2", "softmax"]
TOKENS = torch.randint(6, 102, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_shown_once_and_the_output_does_not_change(kind):
    model = tiny_model(kind).eval()
    seen = []
    before = model(TOKENS).logits
    with attention_calls(model, lambda call: seen.append(call.layer)):
        during = model(TOKENS).logits
    assert seen == [0, 1] and torch.equal(before, during)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_in_the_place_of_the_attention_is_the_same_function(kind):
    model = tiny_model(kind).double().eval()
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    wanted = model(TOKENS, attention_mask=mask).logits
    with attention_calls(model, lambda call: call.reference()):
        torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
    with attention_calls(model, lambda call: torch.zeros_like(call.reference())):
        blind = model(TOKENS).logits
    assert not torch.allclose(blind, model(TOKENS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_token_by_token_is_shown_too(kind):
    model = tiny_model(kind).eval()
    shapes = []
    with attention_calls(model, lambda call: shapes.append((call.q.shape[1], call.k.shape[1]))):
        model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert shapes == [(9, 9)] * 2 + [(1, 10)] * 2 + [(1, 11)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_that_a_query_may_see(kind):
    model = tiny_model(kind).eval()
    found = {}
    with attention_calls(model, lambda call: found.update({call.layer: (call, torch.cat(list(call.logits())))})):
        model(TOKENS)
    call, logits = found[0]
    maps, heads = (1, 4) if kind == "softmax" else (2, 2)
    assert logits.numel() == maps * 2 * heads * 9 * 10 // 2
    q, k = call.maps[0]
    first = (q[0, 0, 0] @ k[0, 0, 0]) * q.shape[-1] ** -0.5
    torch.testing.assert_close(logits[0], first)


def test_nothing_is_left_behind_after_an_error():
    model = tiny_model()
    operators = [attention_module.diff_attention, attention_module.softmax_attention]

    def fail(call):
        raise KeyError("observer")

    with pytest.raises(KeyError), attention_calls(model, fail):
        model(TOKENS)
    assert operators == [attention_module.diff_attention, attention_module.softmax_attention]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_model_in_the_same_context_is_not_seen():
    model, other = tiny_model().eval(), tiny_model("diff_v2").eval()
    seen = []
    with attention_calls(model, lambda call: seen.append(call.layer)):
        other(TOKENS)
    assert seen == []


def test_a_model_without_our_attention_is_refused():
    with pytest.raises(ValueError, match="convert the model"), attention_calls(nn.Linear(2, 2), lambda call: None):
        pass


def test_an_attention_that_goes_another_way_is_an_error(monkeypatch):
    model = tiny_model().eval()
    with attention_calls(model, lambda call: None):
        monkeypatch.setattr(attention_module, "diff_attention", attention_module.softmax_attention)
        attention = model.model.layers[0].self_attn
        monkeypatch.setattr(type(attention), "forward", lambda self, x, context: x)
        with pytest.raises(RuntimeError, match="layer 0 computed its attention past the probe"):
            model(TOKENS)
