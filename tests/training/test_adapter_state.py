import re

import pytest
import torch

from difftune.training.adapter_state import check_adapter

CONFIG = {"r": 8, "auto_mapping": {"base": "hash"}, "base_model_name_or_path": "base", "peft_version": "1"}
TRAINED = {"model.a": torch.Size([2]), "model.b": torch.Size([3, 2])}


def checkpoint(config=CONFIG, **changes):
    state = {name: torch.zeros(shape) for name, shape in TRAINED.items()}
    state = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
    return {"adapter_config": config, "state_dict": state}


def test_the_same_adapter_goes_on_and_so_does_a_whole_model():
    check_adapter(checkpoint(), CONFIG, TRAINED)
    check_adapter({"state_dict": {}}, None, TRAINED)


def test_where_the_base_lies_and_the_version_of_peft_may_change():
    moved = {**CONFIG, "base_model_name_or_path": "elsewhere", "peft_version": "2", "new_key": None}
    check_adapter(checkpoint(moved), CONFIG, TRAINED)


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (CONFIG, None, "a run that trains an adapter, this one trains the whole model"),
        (None, CONFIG, "a run that trains the whole model, this one trains an adapter"),
        (CONFIG, {**CONFIG, "r": 4}, "another adapter: r is 4 here and 8 there"),
        (CONFIG, {**CONFIG, "auto_mapping": {"base": "other"}}, "trained on another base (base) than this run has"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(saved, now, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_adapter(checkpoint(saved), now, TRAINED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.a": None}, r"1 missing \(model\.a\)"),
        ({"model.c": torch.zeros(1)}, r"1 extra \(model\.c\)"),
        ({"model.b": torch.zeros(2)}, r"1 of another shape \(model\.b\)"),
    ],
)
def test_tensors_that_are_not_those_trained_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_adapter(checkpoint(**changes), CONFIG, TRAINED)
