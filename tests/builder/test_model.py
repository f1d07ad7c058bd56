from dataclasses import replace

import pytest
import torch

from difftune.builder import build_model, build_tokenizer, fresh_architecture
from difftune.config import load_config
from difftune.modeling.lambdas import warming_up
from difftune.modeling.quantized import quantization_of
from tests.conftest import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def load(*overrides):
    return load_config(QUICKSTART, ["data.train.*.options.count=100", *overrides])


def test_a_fresh_model_has_the_vocabulary_and_special_tokens_of_the_tokenizer():
    config = load()
    tokenizer = build_tokenizer(config)
    architecture = fresh_architecture(config.model, tokenizer)
    assert architecture.vocab_size == len(tokenizer)
    assert (architecture.pad_token_id, architecture.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_the_seed_decides_the_weights_of_a_fresh_model():
    config = load()
    tokenizer = build_tokenizer(config)
    first, same, other = (build_model(config.model, tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_dtype_and_checkpointing_are_applied_and_lambda_stays_in_float32():
    config = load("model.dtype=bfloat16", "model.gradient_checkpointing=true")
    model = build_model(config.model, build_tokenizer(config), 0)
    dtypes = {("lambda_full" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)} and model.is_gradient_checkpointing


def test_a_loaded_model_is_quantised_in_its_dtype(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path)
    # The same section, as a run with an adapter has it.
    section = replace(config.model, path=str(tmp_path), quantization="nf4", dtype="bfloat16")
    architecture = {key: None for key in section.architecture()}
    with caplog.at_level("INFO", logger="difftune.builder.model"):
        model = build_model(replace(section, **architecture), tokenizer, 0)
    assert quantization_of(model) == {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    assert "projections in 4 bits" in caplog.text


def test_a_loaded_model_takes_another_context(tmp_path):
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    longer = load(f"model.path={tmp_path}", "model.max_position_embeddings=4096", "tokenizer=null")
    model = build_model(longer.model, build_tokenizer(longer), 0)
    assert model.config.max_position_embeddings == 4096 and model.config.hidden_size == 128


def test_a_loaded_model_begins_a_warm_up_of_lambda_and_later_stages_go_on_with_it(tmp_path):
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path / "cold")
    tokenizer.save_pretrained(tmp_path / "cold")
    warm = load(f"model.path={tmp_path / 'cold'}", "model.lambda_warmup_steps=50", "tokenizer=null")
    model = build_model(warm.model, tokenizer, 0)
    for module in warming_up(model):
        module.advance()
    model.save_pretrained(tmp_path / "stage")
    later = build_model(warm.model, tokenizer, 0, start_from=tmp_path / "stage")
    assert {int(module.get_buffer("warmup_step")) for module in warming_up(later)} == {1}
    again = load(f"model.path={tmp_path / 'stage'}", "tokenizer=null")
    assert {int(m.get_buffer("warmup_step")) for m in warming_up(build_model(again.model, tokenizer, 0))} == {1}
    ended = load(f"model.path={tmp_path / 'stage'}", "model.lambda_warmup_steps=0", "tokenizer=null")
    assert not list(warming_up(build_model(ended.model, tokenizer, 0)))


def test_a_fresh_model_can_warm_lambda_up():
    config = load("model.lambda_warmup_steps=50")
    model = build_model(config.model, build_tokenizer(config), 0)
    assert all(float(module()) < 0.8 / 51 + 0.01 for module in warming_up(model)) and list(warming_up(model))
