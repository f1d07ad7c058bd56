import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from tests.modeling.test_attention import KINDS, build


def tokens(*shape):
    return torch.randint(2, 32, shape)


def float64_rms_norm(self, x):
    return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_softmax_equals_llama(kv_heads, tied, dtype, budget, monkeypatch):
    # Llama's norm computes in float32 even in a float64 model; the oracle's is the same formula in float64.
    if dtype == torch.float64:
        monkeypatch.setattr(LlamaRMSNorm, "forward", float64_rms_norm)
    shape = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
        "initializer_range": 0.1,
    }
    llama = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None)).to(dtype).eval()
    for name, bias in llama.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias)
    ours = DiffTransformerForCausalLM(DiffTransformerConfig(**shape, attention="softmax", attention_out_bias=True))
    ours = ours.to(dtype).eval()
    ours.load_state_dict(llama.state_dict())
    x = tokens(2, 20)
    assert (ours(x).logits - llama(x).logits).abs().max() <= budget
    first = ours(x[:, :11], use_cache=True)
    rest = ours(x[:, 11:], past_key_values=first.past_key_values).logits
    assert (rest - llama(x).logits[:, 11:]).abs().max() <= budget
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(x, **options), llama.generate(x, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(10, 1, 1, 1), (5, 8), (1, 12)], ids=str)
def test_cached_decode_equals_the_full_forward(kind, chunks):
    model, x = build(kind), tokens(2, 13)
    expected, cache, parts = model(x).logits, None, []
    for chunk in x.split(chunks, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_of_unequal_prompts_equals_one_by_one(kind):
    model = build(kind)
    prompts = [tokens(1, n) for n in (3, 9, 6)]
    padded = torch.cat([F.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    batched = model.generate(padded, attention_mask=mask, **options)
    for row, prompt in zip(batched, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert row[9:].tolist() == alone[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_and_beams_work_as_the_dynamic_cache(kind):
    model, x = build(kind), tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(x, **options)
    assert torch.equal(model.generate(x, cache_implementation="static", **options), expected)
    beams = model.generate(x, num_beams=3, **options)
    uncached = model.generate(x, num_beams=3, use_cache=False, **options)
    assert torch.equal(beams, uncached)


def test_slots_of_a_static_cache_that_are_not_written_are_not_seen():
    model, x = build("diff_v1"), tokens(1, 6)
    cache = StaticCache(config=model.config, max_cache_len=32)
    torch.testing.assert_close(model(x, past_key_values=cache, use_cache=True).logits, model(x).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_unpacked(kind):
    model, lengths = build(kind), [7, 1, 12, 4, 16]
    documents = [tokens(1, n) for n in lengths]
    packed = torch.cat(documents, 1).view(2, 20)
    labels = packed.clone()
    starts = [0, 7, 8, 20, 24]
    labels.view(-1)[starts] = -100
    cu_seqlens = torch.tensor([*starts, 40])
    out = model(packed, cu_seqlens=cu_seqlens)
    alone = torch.cat([model(d).logits[0] for d in documents])
    torch.testing.assert_close(out.logits.flatten(0, 1), alone, atol=1e-5, rtol=1e-5)
    assert out.past_key_values is None

    losses = [model(d, labels=d) for d in documents if d.shape[1] > 1]
    packed_loss = model(packed, labels=labels, cu_seqlens=cu_seqlens)
    assert packed_loss.num_label_tokens == sum(loss.num_label_tokens for loss in losses) == 35
    torch.testing.assert_close(packed_loss.loss_sum, sum(loss.loss_sum for loss in losses))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_plain_cross_entropy_and_keeps_no_logits(kind):
    model, x = build(kind), tokens(2, 9)
    labels = x.masked_fill(torch.rand(2, 9) < 0.5, -100)
    out = model(x, labels=labels)
    expected = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.logits is None and out.num_label_tokens == (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=100).loss, out.loss_sum / 100)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing_but_memory(kind):
    gradients = []
    x = tokens(2, 9)
    model = build(kind).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(x, labels=x).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_through_the_auto_class_it_is_the_same_model(kind, tied, tmp_path):
    model, x = build(kind, tie_word_embeddings=tied), tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DiffTransformerForCausalLM)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_padding_on_the_right_is_hidden_without_a_mask_and_on_the_left_with_one():
    model, x = build("diff_v1"), tokens(1, 6)
    expected = model(x).logits[0]
    ones, zeros = torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    right = model(F.pad(x, (0, 3)), attention_mask=torch.cat([ones, zeros], 1)).logits[0, :6]
    torch.testing.assert_close(right, expected, atol=1e-5, rtol=1e-5)
    left = model(F.pad(x, (3, 0)), attention_mask=torch.cat([zeros, ones], 1)).logits[0, 3:]
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)


def test_hidden_states_are_returned_when_asked_for():
    model, x = build("diff_v1"), tokens(1, 4)
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(states[0], model.model.embed_tokens(x))
    assert torch.equal(model.lm_head(states[-1]), model(x).logits)


def test_bfloat16_autocast_trains():
    model, x = build("diff_v2").train(), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x).loss
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


def test_casting_leaves_lambda_in_float32():
    for kind in ("diff_v1", "diff_v2"):
        model = cast_weights(build(kind), torch.bfloat16)
        dtypes = {("lambda_full" in name, p.dtype) for name, p in model.named_parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_extending_the_context_equals_building_with_it():
    rope = {"rope_type": "default", "rope_theta": 640000.0}
    model, x = build("diff_v1"), tokens(1, 20)
    longer = build("diff_v1", rope_parameters=rope, max_position_embeddings=65536)
    longer.load_state_dict(model.state_dict())
    before = model(x).logits
    model.extend_context(rope_parameters=rope, max_position_embeddings=65536)
    assert torch.equal(model(x).logits, longer(x).logits) and not torch.equal(before, longer(x).logits)
    assert model.config.max_position_embeddings == 65536 and model.config.rope_parameters == rope


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attention_mask": torch.ones(1, 1, 4, 4)},
            r"attention_mask must have shape \(1, 4\).*give cu_seqlens",
        ),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must have shape \(1, 4\)"),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "exactly one of input_ids and inputs_embeds"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "ends at 2, but the batch holds 1 x 4 = 4 tokens"),
        ({"return_dict": False}, "return_dict=False is not supported"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("diff_v1")(input_ids=tokens(1, 4), **arguments)


def test_a_cache_is_refused_with_packed_documents():
    model = build("diff_v1")
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cache cannot be used with packed documents"):
        model(tokens(1, 4), past_key_values=cache, cu_seqlens=torch.tensor([0, 4]))
