import pytest
import torch

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights, modeling
from difftune.modeling.cache import RoomyLayer
from difftune.verification.model import verify_model

NAMES = ["packed = alone", "batch with padding = alone", "cache, token by token = whole"]


def build(attention="diff_v1", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "attention": attention, "initializer_range": 0.1}
    return cast_weights(DiffTransformerForCausalLM(DiffTransformerConfig(**(sizes | changes))), dtype).eval()


def states(model):
    return {claim.what: claim.state for claim in verify_model(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_the_ways_of_a_model_are_one(attention, dtype):
    model = build(attention, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert states(model) == dict.fromkeys(NAMES, "holds")
    assert model.config.attention_backend == "auto"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_documents_that_see_one_another_are_found(monkeypatch):
    right = modeling.DiffTransformerModel.forward
    monkeypatch.setattr(modeling.DiffTransformerModel, "forward", lambda *x, cu_seqlens=None, **rest: right(*x, **rest))
    assert states(build()) == {**dict.fromkeys(NAMES, "holds"), "packed = alone": "fails"}


def test_padding_that_is_seen_is_found(monkeypatch):
    monkeypatch.setattr(modeling, "key_padding_mask", lambda *arguments: None)
    found = states(build())
    assert found["batch with padding = alone"] == "fails" and found["packed = alone"] == "holds"


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_a_cache_that_loses_a_key_is_found(monkeypatch, attention):
    right = RoomyLayer.update

    def wrong(self, key_states, value_states, *arguments, **more):
        keys, values = right(self, key_states, value_states, *arguments, **more)
        keys = keys.clone()
        keys[:, :, 5] = 0
        return keys, values

    monkeypatch.setattr(RoomyLayer, "update", wrong)
    assert states(build(attention)) == {**dict.fromkeys(NAMES, "holds"), NAMES[2]: "fails"}


def test_a_model_of_few_positions_is_read_as_far_as_they_go():
    assert states(build(max_position_embeddings=16)) == dict.fromkeys(NAMES, "holds")
    with pytest.raises(ValueError, match="max_position_embeddings is 15: a model is verified from 16 positions on"):
        states(build(max_position_embeddings=15))
