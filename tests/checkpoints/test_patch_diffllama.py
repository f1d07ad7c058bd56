import copy

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, StaticCache
from transformers.models.diffllama import modeling_diffllama

import difftune
from difftune.checkpoints.patch_diffllama import patch_diffllama

IMPLEMENTATIONS = ["eager", "sdpa"]


@pytest.fixture(autouse=True)
def undone():
    """No test may leave the library changed, and every patch must be undone whole."""
    before = (modeling_diffllama.DiffLlamaAttention.forward, modeling_diffllama.create_causal_mask)
    inherited = DiffLlamaForCausalLM.__dict__.get("create_masks_for_generate")
    yield
    assert before == (modeling_diffllama.DiffLlamaAttention.forward, modeling_diffllama.create_causal_mask)
    assert DiffLlamaForCausalLM.__dict__.get("create_masks_for_generate") is inherited


@pytest.fixture
def calls(monkeypatch):
    """Counts what our operator serves, so that no test passes on transformers' own attention."""
    from difftune.checkpoints import patch_diffllama as module

    served = []

    def counted(*args, **kwargs):
        served.append(kwargs)
        return module_diff_attention(*args, **kwargs)

    module_diff_attention = module.diff_attention
    monkeypatch.setattr(module, "diff_attention", counted)
    return served


def build(implementation="sdpa", kv_heads=4, **changed):
    options = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.2,
        "attn_implementation": implementation,
        **changed,
    }
    return DiffLlamaForCausalLM(DiffLlamaConfig(**options)).eval()


def tokens(rows=2, length=11):
    return torch.randint(2, 48, (rows, length))


@pytest.mark.parametrize("kv_heads", [2, 4, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_and_gradients_stay_the_same(implementation, kv_heads, calls):
    model, ids = build(implementation, kv_heads).train(), tokens()
    patched = copy.deepcopy(model)
    theirs = model(ids, labels=ids)
    theirs.loss.backward()
    assert not calls
    with difftune.patch_diffllama(backend="sdpa"):
        ours = patched(ids, labels=ids)
        ours.loss.backward()
    assert len(calls) == 2
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(patched.named_parameters(), model.parameters(), strict=True):
        largest = b.grad.abs().max().item()
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-4, atol=1e-5 * max(1.0, largest), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_real_tokens_of_a_padded_batch_stay_the_same(implementation, side, calls):
    model, ids = build(implementation), tokens(3)
    mask = torch.arange(11) < torch.tensor([11, 7, 1])[:, None]
    mask = mask.flip(1) if side == "left" else mask
    expected = model(ids, attention_mask=mask.long()).logits
    with patch_diffllama("sdpa"):
        actual = model(ids, attention_mask=mask.long()).logits
    assert calls[0]["key_padding_mask"] is not None
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_generation_stays_the_same_with_every_cache(implementation, cache, calls):
    model, ids = build(implementation), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(ids, attention_mask=mask, **options)
    with patch_diffllama("sdpa"):
        actual = model.generate(ids, attention_mask=mask, **options)
    assert len(calls) == 2 * 5
    assert torch.equal(actual, expected)


def test_a_prompt_in_pieces_over_a_static_cache(calls):
    model, ids = build(), tokens(2, 9)
    expected = model(ids).logits
    with patch_diffllama("sdpa"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([4, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_positions_keep_documents_apart(implementation, calls):
    model, ids = build(implementation), tokens(1, 10)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    with patch_diffllama("sdpa"):
        actual = model(ids, position_ids=positions, use_cache=False).logits
        by_lengths = model(ids, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 3, 8, 10])).logits
    assert calls[0]["cu_seqlens"].lengths == [3, 5, 2]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_lengths, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_of_four_axes_goes_to_transformers(calls):
    model, ids = build(), tokens(2, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[:, :, 4, 1] = False
    expected = model(ids, attention_mask=mask).logits
    with patch_diffllama("sdpa"):
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert not calls


def test_attention_weights_come_from_transformers(calls):
    model, ids = build("eager"), tokens(2, 5)
    expected = model(ids, output_attentions=True)
    with patch_diffllama("sdpa"):
        actual = model(ids, output_attentions=True)
    assert not calls and len(actual.attentions) == 2
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_gives_the_same_gradients(calls):
    model, ids = build().train(), tokens()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with patch_diffllama("sdpa"):
        model(ids, labels=ids).loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5 * max(1.0, grad.abs().max().item()))
    assert len(calls) == 4


def test_it_is_undone_by_name_and_a_second_call_changes_the_backend(calls):
    model, ids = build(), tokens(1, 4)
    patch = patch_diffllama()
    assert patch_diffllama("reference") is patch and patch.backend == "reference"
    model(ids)
    patch.unpatch()
    patch.unpatch()
    model(ids)
    assert len(calls) == 2 and {call["backend"] for call in calls} == {"reference"}


def test_an_error_inside_undoes_the_patch_and_an_unknown_backend_is_refused():
    with pytest.raises(RuntimeError, match="inside"), patch_diffllama():
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="unknown attention backend 'fast', choose one of auto"):
        patch_diffllama("fast")
