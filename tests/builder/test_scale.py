import pytest
import torch

from difftune.builder import build_architecture, build_model, build_tokenizer, scale
from difftune.builder.scale import (
    build_stage_strategy,
    is_sharded,
    num_parameters,
    settle_strategies,
    training_bytes,
)
from difftune.config import load_config
from difftune.modeling import DiffTransformerConfig
from difftune.training.strategies import FSDP2Strategy
from tests.conftest import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def settled(*overrides):
    config = load_config(QUICKSTART, overrides)
    return settle_strategies(config, build_architecture(config.model, build_tokenizer(config)))


def names(config):
    return [stage.trainer.strategy for stage in config.resolved_stages()]


def test_one_device_needs_no_strategy():
    assert names(settled()) == ["auto", "auto"]
    assert build_stage_strategy(settled().resolved_stages()[0]) == "auto"


@pytest.mark.parametrize(("share", "expected"), [(10.0, "ddp"), (1.0, "fsdp")])
def test_auto_weighs_the_training_against_a_device_and_says_so(monkeypatch, caplog, share, expected):
    config = load_config(QUICKSTART, ["trainer.devices=2"])
    architecture = build_architecture(config.model, build_tokenizer(config))
    count = num_parameters(architecture)
    monkeypatch.setattr(scale, "total_memory_bytes", lambda: int(2 * share * 4 * 4 * count))
    with caplog.at_level("INFO", logger="difftune.builder.scale"):
        result = settle_strategies(config, architecture)
    assert names(result) == [expected, expected]
    assert f"strategy {expected} on 2 devices: weights, gradients and optimiser take" in caplog.text
    assert is_sharded(result) == (expected == "fsdp")


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2)])
def test_the_size_of_training_is_four_copies_of_the_weights(dtype, bytes_each):
    architecture = DiffTransformerConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    count = 100 * 64 * 2 + 64 * 64 * 4 + 3 * 64 * 64 + 3 * 64 + 4 * 16 + 32
    config = load_config(QUICKSTART, [f"model.dtype={dtype}"])
    assert num_parameters(architecture) == count
    assert training_bytes(config, architecture) == 4 * count * bytes_each


def test_what_cannot_be_sharded_is_refused_where_auto_would_shard_it(monkeypatch):
    config = load_config(QUICKSTART, ["trainer.devices=2"])
    architecture = build_architecture(config.model, build_tokenizer(config))
    monkeypatch.setattr(scale, "total_memory_bytes", lambda: 1000)
    monkeypatch.setattr(scale, "fsdp_problems", lambda config: ["adapter.use_dora: set it to false"])
    with pytest.raises(ValueError, match=r"strategy fsdp, for weights.*GiB(.|\n)*use_dora"):
        settle_strategies(config, architecture)


def test_four_bit_weights_are_replicated(monkeypatch, caplog):
    config = load_config(QUICKSTART, ["trainer.devices=2"])
    architecture = build_architecture(config.model, build_tokenizer(config))
    config.model.quantization = "nf4"
    with caplog.at_level("INFO", logger="difftune.builder.scale"):
        assert names(settle_strategies(config, architecture)) == ["ddp", "ddp"]
    assert "4-bit weights are not sharded" in caplog.text


def test_the_settings_of_fsdp_reach_the_strategy():
    config = settled(
        "trainer.strategy=fsdp",
        "trainer.devices=4",
        "trainer.fsdp={tensor_parallel_size: 2, param_dtype: bfloat16, reshard_after_forward: false}",
    )
    strategy = build_stage_strategy(config.resolved_stages()[0])
    assert isinstance(strategy, FSDP2Strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (2, 2)
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    assert strategy.sharding == {**dtypes, "reshard_after_forward": False}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.fsdp.tensor_parallel_size=3", "trainer.devices=2"], "2 devices do not divide into groups"),
        (["trainer.fsdp.tensor_parallel_size=4", "trainer.devices=4"], "4 differential heads, 2 groups.*choose 1 or 2"),
    ],
)
def test_devices_and_heads_that_do_not_divide_are_refused_before_anything_is_read(overrides, expected):
    with pytest.raises(ValueError, match=expected):
        settled("trainer.strategy=fsdp", *overrides)


def test_a_model_to_be_sharded_is_built_without_weights():
    config = load_config(QUICKSTART, ["trainer.strategy=fsdp", "model.dtype=bfloat16"])
    model = build_model(config.model, build_tokenizer(config), 0, sharded=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {p.dtype for n, p in model.named_parameters() if "lambda" not in n} == {torch.bfloat16}
    assert model.weights_on_disk.seed == 0
