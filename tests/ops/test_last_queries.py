import pytest
import torch
import torch.nn.functional as F

from difftune.ops import sdpa
from difftune.ops.last_queries import in_blocks, last_queries
from difftune.verification.equation import make_inputs
from tests.ops.equation import assert_equals_the_equation


@pytest.mark.parametrize("way", ["two parts", "blocks"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize(("T", "S", "G"), [(2, 64, 4), (40, 64, 2), (63, 64, 1), (64, 130, 4)])
def test_output_and_gradients_equal_the_equation(monkeypatch, way, kind, T, S, G):
    monkeypatch.setattr(sdpa, "_MASK_ELEMENTS", 120)
    if way == "blocks":

        def attend(q, k, v, scale):
            def block(q, k, v):
                mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
                heads = [x.transpose(1, 2) for x in (q, k, v)]
                return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True).transpose(
                    1, 2
                )

            return in_blocks(block, q, k, v, rows=7)

        monkeypatch.setattr(sdpa, "last_queries", attend)
    for dtype in (torch.float32, torch.bfloat16):
        assert_equals_the_equation(make_inputs((2, T, S, 4, G, 8), kind, "token", dtype), "sdpa")


def test_nothing_is_kept_that_is_as_large_as_a_mask():
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (800, 1280, 1280))
    for attend in (
        lambda: last_queries(q, k, v, 0.3),
        lambda: in_blocks(lambda q, k, v: (q.sum() + k.sum() + v.sum()) * q, q, k, v, rows=16),
    ):
        kept = {}

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend()
        assert 0 < sum(kept.values()) < 800 * 1280
