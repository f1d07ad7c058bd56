import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.attention import Attention
from difftune.modeling.compat import CACHE
from difftune.ops import rotate
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
    rest = ours(x[:, 11:], **{CACHE: getattr(first, CACHE)}).logits
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
    assert "logits" not in out and out.num_label_tokens == (labels[:, 1:] != -100).sum()
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
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q and cu_seq_lens_k must both be there"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 1, 4])},
            "must both be there and equal",
        ),
        (
            {name: torch.tensor([0, 4]) for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")},
            "two names of one argument",
        ),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "cache and past_key_values are two names"),
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


def test_an_argument_that_nobody_knows_is_an_error_that_names_it():
    with pytest.raises(TypeError, match="cache_positions"):
        build("diff_v2")(tokens(1, 4), cache_positions=None)


@pytest.mark.parametrize("kind", KINDS)
def test_none_means_the_default_as_peft_passes_it(kind):
    model, x = build(kind), tokens(2, 6)
    names = ("attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states", "return_dict")
    out = model(x, **dict.fromkeys(names))
    assert torch.equal(out.logits, model(x).logits) and out.attentions is None and out.hidden_states is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_taken_under_both_of_its_names(kind, name):
    model, x = build(kind), tokens(2, 9)
    held = getattr(model(x[:, :5], use_cache=True), CACHE)
    rest = model(x[:, 5:], **{name: held}).logits
    torch.testing.assert_close(rest, model(x).logits[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_generates_on_from_a_cache(kind):
    model, x = build(kind), tokens(2, 9)
    held = getattr(model(x[:, :5], use_cache=True), CACHE)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(x, **{CACHE: held}, **options), model.generate(x, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_known_by_every_name_that_trainers_use(kind):
    model, x = build(kind), tokens(2, 8)
    labels = x.clone()
    ends = torch.tensor([0, 3, 8, 14, 16], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, 3, 3]])
    expected = model(x, labels=labels, cu_seqlens=ends).loss
    assert not torch.isclose(expected, model(x, labels=labels).loss)
    for given in (
        {"position_ids": positions},
        {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6},
        {"seq_idx": numbers},
        {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "position_ids": positions, "seq_idx": numbers},
    ):
        torch.testing.assert_close(model(x, labels=labels, **given).loss, expected)


def test_positions_that_begin_anew_are_no_documents_where_a_mask_or_a_cache_says_what_is_seen():
    model, x = build("diff_v2"), tokens(1, 6)
    mask, positions = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 2, 3]])
    alone = model(x[:, 2:]).logits
    torch.testing.assert_close(model(x, attention_mask=mask, position_ids=positions).logits[:, 2:], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_has_what_transformers_models_give_in_their_order(kind):
    model, x = build(kind), tokens(2, 6)
    plain = model(x, output_hidden_states=True)
    logits, cache, hidden = model(x, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, plain.logits) and cache.get_seq_length() == 6 and len(hidden) == 3
    loss, logits = model(x, labels=x, return_dict=False)
    assert torch.equal(loss, model(x, labels=x).loss)
    torch.testing.assert_close(logits, plain.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_are_those_of_the_equation(kind):
    model, x = build(kind), tokens(2, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    maps = model(x, attention_mask=mask, output_attentions=True).attentions
    assert len(maps) == 2 and all(one.shape == (2, model.config.num_attention_heads, 6, 6) for one in maps)
    for one in maps:
        sums = one.sum(-1)
        torch.testing.assert_close(sums[1], torch.ones_like(sums[1]))
        assert not one.triu(1).any() and not one[0, :, :, 0].any() and not one[0, :, 0].any()
    # A map of the pair each: the softmax map of the projections of that head, computed here.
    attention = model.model.layers[0].self_attn
    if kind == "softmax":
        return
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(x))
    cos, sin = model.model.rotary_emb(hidden, position_ids=torch.arange(6)[None])
    size = model.config.head_dim
    for p, (q_name, k_name) in enumerate((("q1_proj", "k1_proj"), ("q2_proj", "k2_proj"))):
        k_name = k_name if kind == "diff_v1" else "k_proj"
        q, k = (
            rotate(getattr(attention, name)(hidden).unflatten(-1, (-1, size)), cos, sin) for name in (q_name, k_name)
        )
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        logits = torch.einsum("btnd,bsnd->bnts", q, k) * size**-0.5
        expected = logits.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(maps[0][1, p::2], expected[1])


def test_continuous_batching_is_refused_with_the_reason():
    model = build("diff_v2")
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ValueError, match=r"generate_batch .* is not there for diff_v2 models.*call generate\(\)"):
            call([[1, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_padded_texts_are_generated_as_they_are_alone(kind, dtype):
    model, x = build(kind), tokens(2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    with torch.autocast("cpu", dtype=dtype):
        padded = model(x, attention_mask=mask).logits
        alone = model(x[:1, 3:]).logits
        cached = model(x[:, :6], attention_mask=mask[:, :6], use_cache=True)
        last = model(x[:, 6:], attention_mask=mask, **{CACHE: getattr(cached, CACHE)}).logits
        texts = model.generate(x, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert texts.shape == (2, 11) and padded.isfinite().all()
    budget = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * float(padded.abs().max())}
    torch.testing.assert_close(padded[:1, 3:], alone, **budget)
    torch.testing.assert_close(last, padded[:, 6:], **budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_operator_gets_one_dtype(kind, dtype, monkeypatch):
    # Kernels refuse queries that are wider than their values.
    seen = []

    def watch(self, attention, context, *tensors, **options):
        seen.append({tensor.dtype for tensor in tensors[:3]})
        return original(self, attention, context, *tensors, **options)

    original = Attention._attend
    monkeypatch.setattr(Attention, "_attend", watch)
    with torch.autocast("cpu", dtype=dtype):
        build(kind, qk_norm=True)(tokens(1, 5))
        build(kind)(tokens(1, 5))
    assert len(seen) == 4 and all(dtypes == {dtype} for dtypes in seen)
