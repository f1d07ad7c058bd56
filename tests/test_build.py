import pytest
import torch

from difftune.build import build_data, build_model, build_module, build_tokenizer, fresh_architecture, total_steps
from difftune.config import load_config
from tests.conftest import ROOT

EPOCHS = ("trainer.max_epochs=3", "data.packing=false", "data.micro_batch_size=16")
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


def test_a_loaded_model_takes_another_context(tmp_path):
    config = load()
    tokenizer = build_tokenizer(config)
    build_model(config.model, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    longer = load(f"model.path={tmp_path}", "model.max_position_embeddings=4096", "tokenizer=null")
    model = build_model(longer.model, build_tokenizer(longer), 0)
    assert model.config.max_position_embeddings == 4096 and model.config.hidden_size == 128


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.max_steps=7"], 7),
        (
            ["trainer.max_steps=-1", *EPOCHS, "trainer.accumulate_grad_batches=2"],
            10,
        ),
        (["trainer.max_steps=4", *EPOCHS], 4),
    ],
)
def test_the_schedule_ends_with_the_limit_that_comes_first(overrides, expected):
    config = load("optim.warmup_steps=0", *overrides)
    stage = config.resolved_stages()[0]
    tokenizer = build_tokenizer(config)
    data = build_data(stage, tokenizer, None)
    # 100 rows in batches of 16, three times over: 300 rows, 19 batches, 10 steps of two.
    assert total_steps(stage, data) == expected
    module = build_module(stage, build_model(config.model, tokenizer, 0), data, tokenizer)
    assert module.total_steps == expected and module.betas == (0.9, 0.95)
