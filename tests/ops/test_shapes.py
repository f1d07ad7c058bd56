import pytest
import torch

from difftune.ops import diff_attention, softmax_attention

GOOD = {
    "q": torch.zeros(2, 4, 4, 2, 8),
    "k": torch.zeros(2, 4, 2, 2, 8),
    "v": torch.zeros(2, 4, 2, 16),
    "lam": torch.tensor(0.5),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"q": torch.zeros(2, 4, 4, 3, 8)},
            r"q must have shape \(batch, T, H, 2, D\), got \(2, 4, 4, 3, 8\)",
        ),
        (
            {"k": torch.zeros(2, 4, 2, 2, 6)},
            r"k must have shape \(2, S, G, 2 or 1, 8\), got \(2, 4, 2, 2, 6\)",
        ),
        ({"v": torch.zeros(2, 4, 4, 16)}, r"v must have shape \(2, 4, 2, E\), got \(2, 4, 4, 16\)"),
        ({"q": torch.zeros(2, 4, 3, 2, 8)}, r"query heads \(3\) must be a multiple of key/value heads \(2\)"),
        ({"lam": torch.zeros(2)}, r"lam must have shape \(\), \(4,\) or \(2, 4, 4\), got \(2,\)"),
        ({"q": torch.zeros(2, 5, 4, 2, 8)}, "causal attention needs T <= S, got T=5, S=4"),
        ({"key_padding_mask": torch.ones(2, 4)}, r"must be bool of shape \(2, 4\), True where a key is real"),
        ({"cu_seqlens": torch.tensor([0, 4, 7])}, r"ends at 7, but the batch holds 2 x 4 = 8 tokens"),
        ({"cu_seqlens": torch.tensor([0, 3, 8])}, "from 3 to 8, across a row boundary"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 8]), "key_padding_mask": torch.ones(2, 4, dtype=torch.bool)},
            "give cu_seqlens or key_padding_mask, not both",
        ),
        (
            {"q": torch.zeros(2, 1, 4, 2, 8), "cu_seqlens": torch.tensor([0, 1, 2])},
            r"packed documents need T == S \(no cache\), got T=1, S=4",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        diff_attention(**{**GOOD, **changed})


def test_softmax_attention_refuses_a_pair_axis():
    with pytest.raises(ValueError, match=r"q must have shape \(batch, T, heads, D\), got \(2, 4, 4, 2, 8\)"):
        softmax_attention(GOOD["q"], GOOD["k"], GOOD["v"])
