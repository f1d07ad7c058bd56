import pytest

from difftune.builder import build_data, build_model, build_module, build_tokenizer, total_steps
from difftune.config import load_config
from tests.conftest import ROOT

EPOCHS = ("trainer.max_epochs=3", "data.packing=false", "data.micro_batch_size=16")
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


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
    config = load_config(QUICKSTART, ["data.train.*.options.count=100", "optim.warmup_steps=0", *overrides])
    stage = config.resolved_stages()[0]
    tokenizer = build_tokenizer(config)
    data = build_data(stage, tokenizer, None)
    # 100 rows in batches of 16, three times over: 300 rows, 19 batches, 10 steps of two.
    assert total_steps(stage, data) == expected
    module = build_module(stage, build_model(config.model, tokenizer, 0), data, tokenizer)
    assert module.total_steps == expected and module.betas == (0.9, 0.95)
