import pytest
from lightning.pytorch.strategies import DDPStrategy

from difftune.training.strategies import build_strategy


def test_names_become_strategies():
    assert build_strategy("auto") == "auto"
    assert isinstance(build_strategy("ddp"), DDPStrategy)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="must be one of auto, ddp, fsdp, got 'deepspeed'"):
        build_strategy("deepspeed")
