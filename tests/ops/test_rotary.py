import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from difftune.ops import rotate


def angles(rows, length, dim, dtype=torch.float32):
    half = torch.randn(rows, length, dim // 2, dtype=dtype)
    both = torch.cat([half, half], dim=-1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_equals_llamas_with_any_axes_between(rows):
    cos, sin = angles(rows, 7, 8)
    x = torch.randn(2, 7, 4, 2, 8)
    flat = x.flatten(2, 3).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(flat, flat, cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), expected.transpose(1, 2).unflatten(2, (4, 2)))


def test_gradcheck():
    cos, sin = angles(2, 3, 4, torch.float64)
    x = torch.randn(2, 3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def test_lengths_are_kept():
    cos, sin = angles(1, 5, 16)
    x = torch.randn(2, 5, 3, 16)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_a_strided_input_is_rotated_as_its_copy():
    cos, sin = angles(1, 5, 8)
    x = torch.randn(2, 3, 5, 8).transpose(1, 2)
    assert torch.equal(rotate(x, cos, sin), rotate(x.contiguous(), cos, sin))


def test_angles_of_another_shape_are_refused():
    cos, sin = angles(1, 4, 8)
    with pytest.raises(ValueError, match=r"cos and sin must have shape \(2 or 1, 5, 8\), got \(1, 4, 8\), \(1, 4, 8\)"):
        rotate(torch.randn(2, 5, 3, 8), cos, sin)


def test_two_rotations_in_one_compiled_graph_equal_the_uncompiled():
    cos, sin = angles(1, 9, 8)
    q, k = torch.randn(2, 2, 9, 2, 4, 8).unbind()

    def scores(q, k):
        return torch.einsum("btphd,bsphd->bhpts", rotate(q, cos, sin), rotate(k, cos, sin))

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(scores, backend="aot_eager", fullgraph=True)(q, k), scores(q, k))
