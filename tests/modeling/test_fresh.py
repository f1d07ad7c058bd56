import pytest
import torch
from torch import nn

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.fresh import initial_values


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_drawn_one_by_one_are_those_of_the_whole_model(kind, tied):
    def build():
        config = DiffTransformerConfig(
            vocab_size=30,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention=kind,
            attention_bias=True,
            subln="affine",
            qk_norm=True,
            pad_token_id=1,
            tie_word_embeddings=tied,
        )
        return DiffTransformerForCausalLM(config)

    torch.manual_seed(7)
    expected = dict(build().named_parameters())
    after = torch.rand(3)
    torch.manual_seed(7)
    values = dict(initial_values(build))
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], parameter) for name, parameter in expected.items())
    assert values["model.embed_tokens.weight"][1].eq(0).all()
    assert torch.equal(torch.rand(3), after)


def test_constants_and_parts_are_repeated():
    def build():
        module = nn.Linear(3, 2)
        module.gain = nn.Parameter(torch.full((4,), 0.5))
        with torch.no_grad():
            module.gain[1:3].fill_(2.0)
        return module

    values = dict(initial_values(build))
    assert values["gain"].tolist() == [0.5, 2.0, 2.0, 0.5]
