import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DiffLlamaForCausalLM
from transformers.models.diffllama import modeling_diffllama

from difftune.checkpoints.diffllama import export_diffllama, load_diffllama
from difftune.modeling import DiffTransformerForCausalLM
from tests.checkpoints.llamas import WideTorch

MakeForeign = Callable[..., DiffLlamaForCausalLM]
MakeModel = Callable[..., DiffTransformerForCausalLM]

SHAPES = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {"num_key_value_heads": 4},
    "one_group": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "default_head_dim": {"head_dim": None},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
each_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def truly_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(modeling_diffllama, "torch", WideTorch())
    yield


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 61, shape)


def logits(model: torch.nn.Module, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **kwargs).logits


def cached_logits(model: torch.nn.Module, input_ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of a prefill, then of one token after another from the cache."""
    with torch.no_grad():
        out = model(input_ids=input_ids[:, :prefill], use_cache=True)
        parts = [out.logits]
        for i in range(prefill, input_ids.shape[1]):
            out = model(input_ids=input_ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


def assert_within(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    difference = (actual - expected).abs().max().item()
    assert difference <= limit, difference
    assert expected.std() > 0.3, "logits too small for the comparison to mean anything"


@each_shape
def test_loaded_model_has_the_logits_of_transformers(make_diffllama: MakeForeign, tmp_path: Path, changes) -> None:
    foreign = make_diffllama(**changes)
    foreign.save_pretrained(tmp_path)
    ours, ids = load_diffllama(tmp_path), token_ids(2, 40)
    assert_within(logits(ours, ids), logits(foreign, ids), 1e-5)
    assert_within(cached_logits(ours, ids, 30), cached_logits(foreign, ids, 30), 1e-5)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == foreign.config.tie_word_embeddings


@each_shape
def test_float64_logits_agree_to_rounding(
    make_diffllama: MakeForeign, tmp_path: Path, truly_float64: None, changes
) -> None:
    foreign = make_diffllama(**changes)
    foreign.save_pretrained(tmp_path)
    ours, foreign, ids = load_diffllama(tmp_path).double(), foreign.double(), token_ids(2, 40)
    assert_within(logits(ours, ids), logits(foreign, ids), 1e-10)
    assert_within(cached_logits(ours, ids, 30), cached_logits(foreign, ids, 30), 1e-10)


@each_shape
def test_exported_plain_model_has_our_logits(
    make_model: MakeModel, tmp_path: Path, truly_float64: None, changes
) -> None:
    ours = make_model(subln="plain", **changes)
    export_diffllama(ours, tmp_path)
    foreign, ids = AutoModelForCausalLM.from_pretrained(tmp_path), token_ids(2, 40)
    assert type(foreign) is DiffLlamaForCausalLM
    assert_within(logits(foreign, ids), logits(ours, ids), 1e-5)
    ours, foreign = ours.double(), foreign.double()
    assert_within(logits(foreign, ids), logits(ours, ids), 1e-10)
    assert_within(cached_logits(foreign, ids, 30), cached_logits(ours, ids, 30), 1e-10)


def test_exported_norm_weight_is_folded(make_model: MakeModel, tmp_path: Path) -> None:
    ours, ids = make_model(subln="affine"), token_ids(2, 40)
    assert not torch.equal(ours.model.layers[0].self_attn.subln.weight, torch.ones(20))
    export_diffllama(ours, tmp_path)
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_within(logits(foreign, ids), logits(ours, ids), 1e-5)
    assert_within(logits(load_diffllama(tmp_path), ids), logits(ours, ids), 1e-5)


@each_shape
def test_foreign_round_trip_is_bit_equal(make_diffllama: MakeForeign, tmp_path: Path, changes) -> None:
    foreign = make_diffllama(**changes)
    foreign.save_pretrained(tmp_path / "first")
    export_diffllama(load_diffllama(tmp_path / "first"), tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "attention_out_bias": True}]
)
def test_our_round_trip_is_bit_equal(make_model: MakeModel, tmp_path: Path, changes) -> None:
    ours = make_model(subln="plain", **changes)
    export_diffllama(ours, tmp_path)
    again = load_diffllama(tmp_path).state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"attention_out_bias": True}])
def test_lacking_biases_are_written_as_zeros(make_model: MakeModel, tmp_path: Path, changes) -> None:
    ours, ids = make_model(subln="plain", **changes), token_ids(2, 20)
    export_diffllama(ours, tmp_path)
    assert_within(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(ours, ids), 1e-5)


def test_generation_is_the_same(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    foreign = make_diffllama()
    foreign.save_pretrained(tmp_path)
    ours, ids = load_diffllama(tmp_path), token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :1] = 0
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), foreign.generate(ids, **options))
    padded = {"attention_mask": mask, **options}
    assert torch.equal(ours.generate(ids, **padded), foreign.generate(ids, **padded))


def test_generation_config_travels_both_ways(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    foreign = make_diffllama()
    foreign.generation_config.temperature = 0.6
    foreign.generation_config.do_sample = True
    foreign.save_pretrained(tmp_path / "first")
    ours = load_diffllama(tmp_path / "first")
    assert ours.generation_config.temperature == 0.6
    export_diffllama(ours, tmp_path / "second")
    assert DiffLlamaForCausalLM.from_pretrained(tmp_path / "second").generation_config.temperature == 0.6


def test_shards_are_written_and_read(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    foreign, ids = make_diffllama(), token_ids(1, 20)
    foreign.save_pretrained(tmp_path / "foreign", max_shard_size="50KB")
    assert len(list((tmp_path / "foreign").glob("*.safetensors"))) > 1
    ours = load_diffllama(tmp_path / "foreign")
    assert_within(logits(ours, ids), logits(foreign, ids), 1e-5)
    export_diffllama(ours, tmp_path / "ours", max_shard_size="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = DiffLlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again, ids), logits(foreign, ids))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtype_is_as_stored_or_as_asked_and_lambda_float32(
    make_diffllama: MakeForeign, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    make_diffllama().bfloat16().save_pretrained(tmp_path)
    ours = load_diffllama(tmp_path, dtype=dtype)
    found = {name: p.dtype for name, p in ours.named_parameters()}
    assert {d for name, d in found.items() if "lambda_full" not in name} == {dtype or torch.bfloat16}
    assert {d for name, d in found.items() if "lambda_full" in name} == {torch.float32}


def test_export_of_a_bfloat16_model_keeps_its_dtype_and_lambda(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(subln="plain").save_pretrained(tmp_path / "ours")
    ours = DiffTransformerForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    export_diffllama(ours, tmp_path / "export")
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if "lambda" not in name} == {torch.bfloat16}
    assert {t.dtype for name, t in stored.items() if "lambda" in name} == {torch.float32}
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    assert DiffLlamaForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subln": "none"}, "subln='none': DiffLlama always normalises each head; train with"),
        ({"subln_eps": 1e-6}, r"subln_eps=1e-06 differs from rms_norm_eps=1e-05.*train with equal values"),
        ({"lambda_init": 0.8}, r"lambda_init=0\.8: DiffLlama computes it from the depth"),
        ({"attention": "diff_v2"}, "attention='diff_v2': DiffLlama knows diff_v1 only"),
        ({"attention": "softmax"}, "attention='softmax': DiffLlama knows diff_v1 only"),
        ({"qk_norm": True}, "qk_norm=True: DiffLlama has no norm on queries and keys"),
    ],
)
def test_what_diffllama_cannot_express_is_refused(make_model: MakeModel, tmp_path: Path, changes, message) -> None:
    with pytest.raises(ValueError, match=f"(?s)format='difftune' keeps everything.*{message}"):
        export_diffllama(make_model(**changes), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_every_reason_is_given_at_once(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        export_diffllama(make_model(subln="none", lambda_init=0.8, qk_norm=True), tmp_path / "export")
    assert str(error.value).count("\n  - ") == 3


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama', not 'diffllama'"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported: set it to 0"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised DiffLlama checkpoints are not read"),
        ({"intermediate_size": 81}, r"9 tensors .* do not have their shape: .*gate_proj\.weight is \(80, 48\)"),
        ({"attention_bias": True}, r"12 missing \(model\.layers\.0\.self_attn\.k_proj\.bias"),
    ],
)
def test_configs_that_do_not_fit_are_refused(make_diffllama: MakeForeign, tmp_path: Path, changes, message) -> None:
    make_diffllama().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_diffllama(tmp_path)


def test_configs_of_older_transformers_keep_their_rotary_base(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    foreign, ids = make_diffllama(rope_parameters={"rope_type": "default", "rope_theta": 300.0}), token_ids(1, 40)
    foreign.save_pretrained(tmp_path)
    change_config(tmp_path, rope_theta=300.0, rope_scaling=None, torch_dtype="float32")
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"], fields["dtype"]
    path.write_text(json.dumps(fields))
    assert_within(logits(load_diffllama(tmp_path), ids), logits(foreign, ids), 1e-5)


def test_missing_and_extra_tensors_are_named(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    make_diffllama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.lambda_q3"] = tensors.pop("model.layers.1.self_attn.lambda_q1")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \(.*\.1\.self_attn\.lambda_q1\); 1 extra \(.*lambda_q3\)"):
        load_diffllama(tmp_path)


def test_tied_head_that_differs_from_the_embedding_is_refused(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    make_diffllama(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    load_diffllama(tmp_path)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight that differs from the embedding: set tie_word_embeddings"):
        load_diffllama(tmp_path)


def test_quantised_weights_are_refused(make_diffllama: MakeForeign, tmp_path: Path) -> None:
    make_diffllama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"stores model\.layers\.0\.mlp\.up_proj\.weight as integers"):
        load_diffllama(tmp_path)
