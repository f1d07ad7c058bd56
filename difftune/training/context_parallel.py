"""Rows shared by several processes: who shares them, and what each gets of a batch.

Processes that follow one another share the rows of a micro-batch, ``context_parallel_size`` of them; every strategy
goes on to average gradients over all processes. That is right without further ado: the gradient that a process has is
of the loss of its own tokens with respect to all weights, keys and values that it lent to others included, and the sum
over all processes is that of the whole.
"""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import distributed as dist

from difftune.modeling.modeling import shift_labels
from difftune.ops import ContextShard, Documents

IGNORE_INDEX = -100


def require_divisible(size: int, world_size: int) -> None:
    """Raise ValueError unless the processes of a run can share rows, ``size`` at a time."""
    if world_size % size:
        raise ValueError(
            f"trainer.context_parallel_size={size} must divide the number of processes, which is {world_size}: start "
            f"a multiple of {size}, or set it to 1"
        )


def require_whole_products(strategy: Strategy) -> None:
    """Raise ValueError under tensor parallelism, whose ranks need the same tokens."""
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "trainer.context_parallel_size does not go with tensor parallelism: the devices that share a product need "
            "the same tokens; set one of the two sizes to 1"
        )


def build_context_group(size: int, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """The processes that share this process's rows. Collective: all processes of the run have to call it.

    Args:
        size: How many they are, at least 2.
        timeout: After which a process gives up on the others. None: torch's.

    Raises:
        ValueError: If the number of processes is not a multiple of it.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    require_divisible(size, world_size)
    group, _ = dist.new_subgroups(group_size=size, timeout=timeout)
    return group


def split_batch(batch: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, Any]:
    """What this process has of a batch that all of the group were given.

    Args:
        batch: `input_ids`, `labels`, `position_ids`, and `cu_seqlens` or an `attention_mask` with padding on the right,
            all of whole rows. Rows without documents are padded to a length that can be cut.
        group: The processes that share it.

    Returns:
        Arguments of the model: `input_ids`, `labels` (shifted) and `position_ids` of this process's tokens, and the
        `shard`.

    Raises:
        ValueError: If packed rows cannot be cut evenly, padding is not on the right, or the batch holds something else,
            such as what a teacher said.
    """
    known = {"input_ids", "labels", "position_ids", "cu_seqlens", "attention_mask"}
    if unknown := sorted(set(batch) - known):
        raise ValueError(f"a batch with {', '.join(unknown)} cannot be shared: set trainer.context_parallel_size=1")
    ids, labels = batch["input_ids"], batch["labels"]
    rows, length = ids.shape
    mask = batch.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("rows that are padded on the left cannot be shared: pad on the right, or pack documents")
    positions = batch.get("position_ids")
    if positions is None:
        if "cu_seqlens" in batch:
            raise ValueError("packed rows need position_ids to be shared")
        positions = torch.arange(length, device=ids.device).expand(rows, length)
    targets, size = shift_labels(labels), dist.get_world_size(group)
    documents = Documents(batch["cu_seqlens"]) if "cu_seqlens" in batch else None
    if documents is None and (missing := -length % (2 * size)):
        # Behind every real token, so that none of them sees it.
        ids = torch.nn.functional.pad(ids, (0, missing))
        positions = torch.nn.functional.pad(positions, (0, missing))
        targets = torch.nn.functional.pad(targets, (0, missing), value=IGNORE_INDEX)
        length += missing
    shard = ContextShard(
        dist.get_rank(group), size, rows=rows, length=length, documents=documents, group=group, device=ids.device
    )
    return {
        "input_ids": shard.split(ids),
        "labels": shard.split(targets),
        "position_ids": shard.split(positions),
        "shard": shard,
    }
