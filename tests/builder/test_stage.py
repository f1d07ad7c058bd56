import pytest
from rich.console import Console

from difftune.builder import build_data, build_model, build_module, build_tokenizer, build_trainer, total_steps
from difftune.config import load_config
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.run_folder import RunFolder
from difftune.training.preemption import Preemption
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


def test_shares_of_the_training_are_of_the_steps_of_all_devices(tmp_path):
    """300 rows in batches of 16 are 19 steps of one device, and 10 of two."""
    config = load_config(
        QUICKSTART,
        [
            "stages=[]",
            "data.train=[{path: synthetic:arithmetic, options: {count: 100}}]",
            "trainer.max_steps=-1",
            *EPOCHS,
            "optim.warmup_steps=0",
            "trainer.devices=2",
            "trainer.strategy=ddp",
            "trainer.accelerator=cpu",
            "logging.loggers=[jsonl]",
            f"run_dir={tmp_path}",
        ],
    )
    (stage,) = config.resolved_stages()
    tokenizer = build_tokenizer(config)
    data, model = build_data(stage, tokenizer, None), build_model(config.model, tokenizer, 0)
    folder, console = RunFolder(tmp_path), Console()
    trainer = build_trainer(
        config, stage, folder, model, tokenizer, data, Preemption(), resume_step=None, console=console
    )
    module = build_module(stage, model, data, tokenizer, trainer.world_size)
    (evaluation,) = [callback for callback in trainer.callbacks if isinstance(callback, ScheduledEvaluation)]
    assert stage.evaluation.every_fraction == 0.25
    assert evaluation._plan(trainer, module) == {2, 5, 8, 10}
