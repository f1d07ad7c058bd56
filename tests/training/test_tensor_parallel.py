import contextlib

import pytest
from torch import nn

from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.training.tensor_parallel import check_tensor_parallel, parallelize_layers, shared_parameters
from tests.training.scale_ranks import tiny_model


class Mesh:
    def size(self):
        return 2


def accepted_sizes(config):
    """Which of the sizes up to 4 are not refused."""
    found = []
    for size in range(1, 5):
        with contextlib.suppress(ValueError):
            check_tensor_parallel(config, size)
            found.append(size)
    return found


@pytest.mark.parametrize("kind, sizes", [("diff_v1", [1, 2]), ("diff_v2", [1, 2, 4]), ("softmax", [1, 2, 4])])
def test_sizes_that_divide_heads_and_groups_are_accepted(kind, sizes):
    assert accepted_sizes(tiny_model(attention=kind).config) == sizes


def test_a_pair_is_never_split():
    # Eight softmax maps are four heads, in two groups of keys and values.
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 .*4 differential heads, 2 groups.*choose 1 or 2"):
        check_tensor_parallel(tiny_model().config, 4)
    with pytest.raises(ValueError, match="41 columns of the gated unit"):
        check_tensor_parallel(tiny_model(intermediate_size=41).config, 2)


def test_other_models_and_adapters_are_refused():
    with pytest.raises(ValueError, match="difftune's own models, not Linear"):
        parallelize_layers(nn.Linear(2, 2), Mesh())
    model = tiny_model()
    add_adapter(model, AdapterSettings(rank=2))
    with pytest.raises(ValueError, match="LoRA lies beside them"):
        parallelize_layers(model, Mesh())


def test_shared_are_lambda_and_the_norms_of_heads_alone():
    model = tiny_model(num_hidden_layers=1, qk_norm=True)
    names = {id(p): n.removeprefix("model.layers.0.self_attn.") for n, p in model.named_parameters()}
    shared = {names[id(p)] for p in shared_parameters(model)}
    vectors = {f"lambda_full.lambda_{side}{number}" for side in "qk" for number in (1, 2)}
    assert shared == vectors | {"subln.weight", "q_norm.weight", "k_norm.weight"}
    assert not shared_parameters(tiny_model(num_hidden_layers=1, attention="diff_v2"))
