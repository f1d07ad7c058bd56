"""The permutations between the layouts of the world and ours: the only file that knows a foreign one.

Ours keeps a projection for each member of the pair and gives every key/value group its values in one
piece: ``v_proj`` rows are ``[G, 2D]``. DiffLlama fuses the pair and splits by halves: rows of ``q_proj``
are ``[2, H, D]`` (head ``i`` pairs with head ``i + H``), of ``k_proj`` ``[2, G, D]``, and of ``v_proj``
``[2, G, D]`` (group ``g`` reads ``cat(v[g], v[g + G])``). ``o_proj`` reads ``[H, 2D]`` in both.

Every function permutes the first axis, so it serves weights ``[rows, in]`` and biases ``[rows]`` alike.
"""

import torch


def split_pair(fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a half-split projection into the two members of the pair: ``fused.chunk(2, dim=0)``.

    Args:
        fused: Rows ``[2 * n * D, ...]``; the first half belongs to the positive map.

    Returns:
        The rows of map 1 and of map 2, each ``[n * D, ...]``, in the dtype of ``fused``.

    Raises:
        ValueError: If the number of rows is odd.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``, ``torch.chunk(attn_output, 2, dim=2)``.

    Example:
        >>> split_pair(torch.tensor([10, 11, 20, 21]))
        (tensor([10, 11]), tensor([20, 21]))
    """
    if fused.shape[0] % 2:
        raise ValueError(f"a fused pair needs an even number of rows, got {fused.shape[0]}")
    first, second = fused.chunk(2, dim=0)
    return first, second


def join_pair(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`split_pair`: ``torch.cat([first, second])``.

    Args:
        first: Rows of the positive map, ``[n * D, ...]``.
        second: Rows of the negative map, the same shape.

    Returns:
        Rows ``[2 * n * D, ...]`` in the half-split order, in the dtype of the arguments.

    Raises:
        ValueError: If the two shapes differ.

    Source:
        The inverse of transformers' ``torch.chunk(attn_output, 2, dim=2)``.

    Example:
        >>> join_pair(torch.tensor([10, 11]), torch.tensor([20, 21]))
        tensor([10, 11, 20, 21])
    """
    if first.shape != second.shape:
        raise ValueError(f"the two maps of a pair differ in shape: {tuple(first.shape)}, {tuple(second.shape)}")
    return torch.cat([first, second])


def halves_to_groups(values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Bring value rows from ``[2, G, D]`` (halves) to ``[G, 2, D]`` (each group in one piece).

    Args:
        values: Rows ``[2 * G * D, ...]``: all first halves, then all second halves.
        num_groups: ``G``, the number of differential key/value groups.

    Returns:
        The same rows permuted, contiguous, in the dtype of ``values``.

    Raises:
        ValueError: If the rows do not divide into ``2 * G`` heads.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``, ``torch.chunk(value_states, 2, dim=1)``.

    Example:
        >>> halves_to_groups(torch.tensor([1, 2, 10, 20]), num_groups=2)
        tensor([ 1, 10,  2, 20])
    """
    return _swap_leading_axes(values, 2, num_groups)


def groups_to_halves(values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Inverse of :func:`halves_to_groups`: value rows from ``[G, 2, D]`` to ``[2, G, D]``.

    Args:
        values: Rows ``[G * 2 * D, ...]``: the ``2D`` rows of one group after another.
        num_groups: ``G``, the number of differential key/value groups.

    Returns:
        The same rows permuted, contiguous, in the dtype of ``values``.

    Raises:
        ValueError: If the rows do not divide into ``2 * G`` heads.

    Source:
        The inverse of transformers' ``torch.chunk(value_states, 2, dim=1)``.

    Example:
        >>> groups_to_halves(torch.tensor([1, 10, 2, 20]), num_groups=2)
        tensor([ 1,  2, 10, 20])
    """
    return _swap_leading_axes(values, num_groups, 2)


def fold_norm_weight(o_weight: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """Fold the weight of the sublayer norm into the columns of the output projection.

    ``o_proj(norm(x) * w) == o_folded(norm(x))`` with ``o_folded = o_weight * tile(w)``: the one weight
    ``w`` serves every head, so it repeats along the columns. The product of two bfloat16 weights is kept in float32,
    which holds it exactly; rounding it back would move the logits by far more than the layout does.

    Args:
        o_weight: Output projection, ``[hidden, H * 2D]``.
        norm_weight: Weight of the norm over one head's output, ``[2D]``.

    Returns:
        The folded projection, ``[hidden, H * 2D]``, in the dtype of ``o_weight`` but at least float32.

    Raises:
        ValueError: If the columns are not a whole number of heads.

    Source:
        Ye et al., "Differential Transformer", arXiv:2410.05258, Eq. (3), whose norm has a weight; DiffLlama's has none.

    Example:
        >>> fold_norm_weight(torch.ones(1, 4), torch.tensor([2.0, 3.0]))
        tensor([[2., 3., 2., 3.]])
    """
    heads, rest = divmod(o_weight.shape[1], norm_weight.shape[0])
    if rest:
        raise ValueError(
            f"o_proj has {o_weight.shape[1]} columns, not a whole number of heads of {norm_weight.shape[0]}"
        )
    dtype = torch.promote_types(o_weight.dtype, torch.float32)
    return o_weight.to(dtype) * norm_weight.to(dtype).repeat(heads)


def _swap_leading_axes(rows: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Permute rows from ``[outer, inner, D]`` to ``[inner, outer, D]``."""
    if rows.shape[0] % (outer * inner):
        raise ValueError(f"{rows.shape[0]} value rows do not divide into {outer} x {inner} heads")
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2).contiguous()
