import pytest
import torch

from difftune.modeling.lambdas import LambdaV1
from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import find_resumable
from difftune.training.lambda_warmup import LambdaWarmup
from tests.training.toy import ToyData, ToyModel, build_module, build_trainer, parameters

STEPS = 8


def lambdas(model):
    return [module for module in model.modules() if isinstance(module, LambdaV1)]


def fit(folder=None, *, steps=12, warmup=STEPS, ckpt_path=None, callbacks=None, spoil=()):
    torch.manual_seed(1)
    module = build_module(model=ToyModel(dropout=0.2))
    for each in lambdas(module):
        each.warm_up(warmup)
    saving = [Checkpointing(folder, every_n_steps=4)] if folder else []
    trainer = build_trainer(
        [*([LambdaWarmup()] if callbacks is None else callbacks), *saving],
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=2,
    )
    trainer.fit(module, ToyData(spoil=spoil), ckpt_path=ckpt_path)
    return module


def steps_of(module):
    return [int(each.warmup_step) for each in lambdas(module)]


def test_it_counts_optimiser_steps_skipped_ones_too_and_ends_at_the_last():
    assert steps_of(fit(steps=1)) == [1, 1]
    assert steps_of(fit(steps=5, spoil=(4, 5))) == [5, 5]
    assert steps_of(fit(steps=12)) == [STEPS, STEPS]


def test_a_model_without_warmup_is_left_alone():
    module = fit(steps=2, warmup=0)
    assert not any(dict(each.named_buffers()) for each in lambdas(module))
    assert torch.equal(parameters(module.model), parameters(fit(steps=2, warmup=0, callbacks=[]).model))


def test_resumed_in_the_middle_is_bitwise_the_straight_run(tmp_path):
    straight = fit()
    fit(tmp_path, steps=5)
    path = find_resumable(tmp_path)
    assert path.name == "step-00000005"
    resumed = fit(tmp_path, ckpt_path=path)
    assert torch.equal(parameters(straight.model), parameters(resumed.model))
    assert steps_of(resumed) == [STEPS, STEPS]
    # Shows that it can fail: the same, but the ramp stands still.
    assert not torch.equal(parameters(straight.model), parameters(fit(callbacks=[]).model))


def test_lambda_in_16_bits_cannot_count_and_is_refused():
    module = build_module(model=ToyModel())
    for each in lambdas(module):
        each.warm_up(STEPS)
        each.bfloat16()
    with pytest.raises(
        ValueError, match=r"lambda is torch\.bfloat16, in which .* cannot be counted: keep it in float32"
    ):
        build_trainer([LambdaWarmup()], max_steps=1).fit(module, ToyData())
