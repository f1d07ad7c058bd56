"""The public entry decodes where it should: with few queries and no gradient."""

import pytest
import torch

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.ops import diff_attention
from difftune.ops.triton import decode


@pytest.fixture
def decoded(monkeypatch):
    calls = []
    launch = decode.decode

    def counted(*arguments):
        calls.append(arguments)
        return launch(*arguments)

    monkeypatch.setattr(decode, "decode", counted)
    return calls


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2"])
def test_generation_decodes_with_the_kernel(kind, decoded, device):
    options = {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = DiffTransformerConfig(vocab_size=16, attention=kind, pad_token_id=0, eos_token_id=None, **options)
    model = DiffTransformerForCausalLM(config).eval().to(device)
    ids, mask = torch.randint(1, 16, (2, 12), device=device), torch.ones(2, 12, dtype=torch.long, device=device)
    mask[1, :3] = 0
    wanted = {"max_new_tokens": 3, "do_sample": False}
    model.config.attention_backend = "sdpa"
    expected = model.generate(ids, attention_mask=mask, **wanted)
    model.config.attention_backend = "triton"
    assert torch.equal(model.generate(ids, attention_mask=mask, **wanted), expected)
    # The prompt has more tokens than decoding serves; the first token comes from it.
    assert len(decoded) == 2


def test_with_gradients_the_forward_kernel_serves(decoded, device):
    q, k, v = torch.randn(1, 1, 2, 2, 32), torch.randn(1, 9, 1, 2, 32), torch.randn(1, 9, 1, 64)
    q, k, v = (x.to(device).requires_grad_() for x in (q, k, v))
    lam = torch.tensor(0.5, device=device)
    with_gradient = diff_attention(q, k, v, lam, backend="triton")
    assert not decoded
    with torch.no_grad():
        torch.testing.assert_close(diff_attention(q, k, v, lam, backend="triton"), with_gradient.detach())
    assert len(decoded) == 1
