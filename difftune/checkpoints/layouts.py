"""The permutations between the layouts of the world and ours: the only file that knows a foreign one.

Ours keeps a projection for each member of the pair and gives every key/value group its values in one
piece: ``v_proj`` rows are ``[G, 2D]``. DiffLlama fuses the pair and splits by halves: rows of ``q_proj``
are ``[2, H, D]`` (head ``i`` pairs with head ``i + H``), of ``k_proj`` ``[2, G, D]``, and of ``v_proj``
``[2, G, D]`` (group ``g`` reads ``cat(v[g], v[g + G])``). ``o_proj`` reads ``[H, 2D]`` in both.

Microsoft's code fuses the pair and interleaves it: rows of ``q_proj`` are ``[H, 2, D]`` (heads ``2i`` and ``2i + 1``
pair), of ``k_proj`` ``[G, 2, D]``, and of ``v_proj`` ``[G, 2D]`` as ours. Its rotation turns adjacent dimensions of a
head against one another (GPT-J), Llama's, DiffLlama's and ours the two halves of the head. The lambda vectors need no
permutation: they meet only each other, in a dot product.

Every function permutes the first axis, so it serves weights ``[rows, in]`` and biases ``[rows]`` alike.
"""

import torch

from difftune.modeling import DiffTransformerConfig


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


def split_interleaved_pair(fused: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a projection whose heads ``2i`` and ``2i + 1`` pair into the two members of the pair.

    Args:
        fused: Rows ``[num_pairs * 2 * D, ...]``; of each pair of heads the first belongs to the positive map.
        num_pairs: Differential heads of a query projection, groups of a key projection.

    Returns:
        The rows of map 1 and of map 2, each ``[num_pairs * D, ...]``, in the dtype of ``fused``.

    Raises:
        ValueError: If the rows do not divide into so many pairs.

    Source:
        microsoft/unilm ``Diff-Transformer/multihead_flashdiff_2.py``, ``q.reshape(..., num_heads, 2, head_dim)``.

    Example:
        >>> split_interleaved_pair(torch.tensor([10, 20, 11, 21]), num_pairs=2)
        (tensor([10, 11]), tensor([20, 21]))
    """
    return split_pair(_swap_leading_axes(fused, num_pairs, 2))


def join_interleaved_pair(first: torch.Tensor, second: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """Inverse of :func:`split_interleaved_pair`.

    Args:
        first: Rows of the positive map, ``[num_pairs * D, ...]``.
        second: Rows of the negative map, the same shape.
        num_pairs: Differential heads of a query projection, groups of a key projection.

    Returns:
        Rows ``[num_pairs * 2 * D, ...]``, interleaved by heads, in the dtype of the arguments.

    Raises:
        ValueError: If the shapes differ, or the rows do not divide into so many heads.

    Source:
        The inverse of ``q.reshape(..., num_heads, 2, head_dim)`` in microsoft/unilm.

    Example:
        >>> join_interleaved_pair(torch.tensor([10, 11]), torch.tensor([20, 21]), num_pairs=2)
        tensor([10, 20, 11, 21])
    """
    return _swap_leading_axes(join_pair(first, second), 2, num_pairs)


def adjacent_to_half_rotary(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection for a rotation of halves instead of adjacent dimensions.

    Within each head row ``2j`` goes to ``j`` and row ``2j + 1`` to ``j + D/2``: the two that one angle turns. Queries
    and keys reordered alike keep their scores.

    Args:
        rows: ``[n * D, ...]``: heads whose rotation turns ``(2j, 2j + 1)``.
        head_dim: ``D``, even.

    Returns:
        The same rows permuted, in the dtype of ``rows``: heads whose rotation turns ``(j, j + D/2)``.

    Raises:
        ValueError: If ``head_dim`` is odd, or the rows are not a whole number of heads.

    Source:
        Su et al., "RoFormer", arXiv:2104.09864, Eq. (34), which turns adjacent dimensions; microsoft/unilm
        ``apply_rotary_emb(..., interleaved=True)``.

    Example:
        >>> adjacent_to_half_rotary(torch.tensor([0, 10, 1, 11]), head_dim=4)
        tensor([ 0,  1, 10, 11])
    """
    return _swap_axes_of_heads(rows, head_dim, (-1, 2))


def half_to_adjacent_rotary(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Inverse of :func:`adjacent_to_half_rotary`.

    Args:
        rows: ``[n * D, ...]``: heads whose rotation turns ``(j, j + D/2)``.
        head_dim: ``D``, even.

    Returns:
        The same rows permuted, in the dtype of ``rows``: heads whose rotation turns ``(2j, 2j + 1)``.

    Raises:
        ValueError: If ``head_dim`` is odd, or the rows are not a whole number of heads.

    Source:
        The inverse of the reordering that microsoft/unilm's ``interleaved=True`` needs.

    Example:
        >>> half_to_adjacent_rotary(torch.tensor([0, 1, 10, 11]), head_dim=4)
        tensor([ 0, 10,  1, 11])
    """
    return _swap_axes_of_heads(rows, head_dim, (2, -1))


def fold_norm_weight(o_weight: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """Fold the weight of the sublayer norm into the columns of the output projection.

    ``o_proj(norm(x) * w) == o_folded(norm(x))`` with ``o_folded = o_weight * tile(w)``: the one weight
    ``w`` serves every head, so it repeats along the columns. The product of two bfloat16 weights is kept in float32,
    which holds it exactly; rounding it back would move the logits by far more than the layout does. A weight of ones
    changes nothing, not even the dtype.

    Args:
        o_weight: Output projection, ``[hidden, H * 2D]``.
        norm_weight: Weight of the norm over one head's output, ``[2D]``.

    Returns:
        The folded projection, ``[hidden, H * 2D]``, in the dtype of ``o_weight`` but at least float32; ``o_weight``
        itself where the norm's weight is one.

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
    if bool((norm_weight == 1).all()):
        return o_weight
    dtype = torch.promote_types(o_weight.dtype, torch.float32)
    return o_weight.to(dtype) * norm_weight.to(dtype).repeat(heads)


def pair_columns(o_weight: torch.Tensor, groups: int, members: int) -> torch.Tensor:
    """Bring the columns of a Llama's output projection next to each other for heads that become a pair.

    Neighbouring key/value heads ``2g`` and ``2g + 1`` pair, and so do the queries that read them: member ``t`` of the
    one with member ``t`` of the other. The differential head ``(g, t)`` puts out ``2D`` numbers, the first ``D`` of
    which stand where the first head's output stood.

    Args:
        o_weight: Columns ``[groups, 2, members, D]``, shape ``[hidden, groups * 2 * members * D]``.
        groups: Pairs of key/value heads.
        members: Query heads of one key/value head.

    Returns:
        The columns as ``[groups, members, 2, D]``, contiguous, in the dtype of ``o_weight``.

    Raises:
        ValueError: If the columns do not divide so.

    Source:
        Ye et al., "Differential Transformer", arXiv:2410.05258, Eq. (1), whose values are twice as wide.

    Example:
        >>> pair_columns(torch.tensor([[1, 2, 10, 20]]), groups=1, members=2)
        tensor([[ 1, 10,  2, 20]])
    """
    columns = o_weight.shape[1]
    if columns % (groups * 2 * members):
        raise ValueError(f"{columns} columns do not divide into {groups} pairs of {members} heads")
    return o_weight.unflatten(1, (groups, 2, members, -1)).transpose(2, 3).flatten(1).contiguous()


def _swap_leading_axes(rows: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Permute rows from ``[outer, inner, D]`` to ``[inner, outer, D]``."""
    if rows.shape[0] % (outer * inner):
        raise ValueError(f"{rows.shape[0]} rows do not divide into {outer} x {inner} heads")
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _swap_axes_of_heads(rows: torch.Tensor, head_dim: int, axes: tuple[int, int]) -> torch.Tensor:
    """Permute the rows of every head from ``axes``, whose product is ``head_dim``, to the two swapped."""
    if head_dim % 2 or rows.shape[0] % head_dim:
        raise ValueError(f"{rows.shape[0]} rows are not a whole number of heads of {head_dim}, which must be even")
    heads = rows.unflatten(0, (-1, head_dim)).unflatten(1, axes)
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def require_whole_lambda(name: str, step: torch.Tensor, config: DiffTransformerConfig) -> None:
    """Raise unless the warm-up of lambda has ended: foreign layouts compute lambda whole, and have no place for a step.

    A factor before lambda cannot be folded either: its constant part is fixed there by the depth of the layer.

    Args:
        name: Of the buffer, for the message.
        step: Optimiser steps of the warm-up that were taken, shape ``()``.
        config: Of the model.

    Raises:
        ValueError: If it is in the middle.
    """
    if step.item() < config.lambda_warmup_steps:
        raise ValueError(
            f"{name}: lambda is at step {int(step)} of the {config.lambda_warmup_steps} of its warm-up, which other "
            "formats cannot express; difftune's own keeps it. Train on to its end, or end it now with "
            "model.lambda_warmup_steps=0, which changes the function"
        )
