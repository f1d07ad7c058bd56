"""Memory of a training step, counted on the step itself: forward, loss and backward run on tensors without contents.

The model, the loss and the adapters are those that train; their tensors have shapes and no memory (torch's fake
tensors), and a dispatch mode adds up the bytes that live at each moment. So there is no second formula for activations
that could go stale. Three blocks are run; those between the first and the last are alike, and counted as often as there
are. For a GPU the kernels of a GPU stand in the place of the CPU's, in what they keep and return.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from difftune import losses
from difftune.evaluation.attention_calls import AttentionCall, attention_calls
from difftune.modeling import layers as layers_module
from difftune.modeling.modeling import DecoderLayer
from difftune.ops import Documents
from difftune.ops.linear_cross_entropy import chunk_starts
from difftune.ops.triton.attention import triton_diff_attention
from difftune.ops.triton.tiles import TILES

LOSS_BACKWARD = "backward of the loss"
"""The phase between the end of the forward and the backward of the last block."""
TRACED_BLOCKS = 3
"""Blocks that are run: the first, one for all between, the last."""


@dataclass(frozen=True)
class Phase:
    """One part of a step; all figures in bytes, those of parameters and of the optimiser left out."""

    name: str
    """`forward`, `loss`, `backward of the loss` or `backward`."""
    block: int | None
    """Block from 0; None before the first and after the last."""
    held: int
    """Activations when it begins."""
    peak: int
    """Most of activations and of whatever else is computed, at once."""
    peak_with_gradients: int
    """The same with the gradients that this phase makes."""
    gradients: int
    """Gradients that it leaves to the optimiser."""
    left: int
    """Activations when it ends."""

    def __str__(self) -> str:
        """Name and block, as `backward of block 3`."""
        where = {"forward": "forward, before the blocks", "backward": "backward, below the blocks"}
        return where.get(self.name, self.name) if self.block is None else f"{self.name} of block {self.block}"


def trace_step(
    module: Any,
    batch: dict[str, Any],
    *,
    num_blocks: int,
    label_tokens: int,
    autocast: torch.dtype | None = None,
    gpu: bool = False,
) -> list[Phase]:
    """The phases of one micro-batch, forward to the end of the backward.

    Args:
        module: A `FinetuneModule` whose model is on the meta device, with all blocks or with `TRACED_BLOCKS`.
        batch: What its `compute_loss` takes; of tensors only shape and dtype count, but for `Documents`.
        num_blocks: Of the whole model; the phases are those of all of them.
        label_tokens: Label tokens of the batch.
        autocast: Dtype of mixed precision; None is none.
        gpu: Whether to count a GPU's kernels instead of the CPU's.
    """
    model: nn.Module = module.model
    blocks = [layer for layer in model.modules() if isinstance(layer, DecoderLayer)]
    assert len(blocks) in (num_blocks, TRACED_BLOCKS), "the caller built the model for it"
    model.train()
    documents = batch.get("cu_seqlens")
    if isinstance(documents, Documents):
        # Made of numbers, which fake tensors have not: computed before.
        _ = documents.buckets, documents.document_ids, documents._slots
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_contents(model)
        if getattr(module, "teacher", None) is not None:
            _without_contents(module.teacher.model)
        fake = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        with contextlib.ExitStack() as stack:
            if gpu:
                stack.enter_context(_kernels_of_a_gpu(model))
            stack.enter_context(_few_chunks())
            memory = stack.enter_context(_LiveMemory(label_tokens))
            memory.disregard([*model.parameters(), *model.buffers(), *_tensors(fake)])
            stack.enter_context(_watched(model, blocks, memory))
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = module.compute_loss(fake)[0]
            # What autocast had cast is gone.
            memory.begin(LOSS_BACKWARD, None)
            loss.backward()
            del loss
    return _all_blocks(memory.ended(), num_blocks) if len(blocks) < num_blocks else memory.ended()


def kept_a_block(phases: list[Phase]) -> int:
    """Activations that a block keeps from its forward to its backward, bytes."""
    found = [phase for phase in phases if phase.name == "forward" and phase.block is not None]
    # The first keeps what the others share with the block before.
    typical = found[min(1, len(found) - 1)]
    return typical.left - typical.held


def _all_blocks(phases: list[Phase], num_blocks: int) -> list[Phase]:
    """The phases of all blocks, from those of the first, one between and the last."""
    more = num_blocks - TRACED_BLOCKS
    up, down = (next(p for p in phases if p.name == name and p.block == 1) for name in ("forward", "backward"))
    # With mixed precision a block also keeps its weights as they were cast, to the end of the forward.
    until_loss, until_backward = up.left - up.held, down.held - down.left
    found: list[Phase] = []
    for phase in phases:
        kept = until_backward if phase.name.startswith("backward") else until_loss
        if phase.block == 1:
            order: Sequence[int] = range(more + 1)
            for index in reversed(order) if phase is down else order:
                found.append(_above(replace(phase, block=1 + index), kept * index))
        elif phase.block == TRACED_BLOCKS - 1:
            found.append(_above(replace(phase, block=num_blocks - 1), kept * more))
        elif phase.name == "loss":
            found.append(replace(_above(phase, kept * more), left=phase.left + until_backward * more))
        else:
            found.append(_above(phase, kept * more if phase.name == LOSS_BACKWARD else 0))
    return found


def _above(phase: Phase, more: int) -> Phase:
    """A phase during which so many bytes more are kept."""
    return replace(
        phase,
        held=phase.held + more,
        peak=phase.peak + more,
        peak_with_gradients=phase.peak_with_gradients + more,
        left=phase.left + more,
    )


class _LiveMemory(TorchDispatchMode):
    """Adds up the storages that live, phase by phase, and answers what only real tensors could."""

    def __init__(self, label_tokens: int) -> None:
        super().__init__()
        self._label_tokens = label_tokens
        self._known: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}
        self._live = self._gradients = self._gradients_before = 0
        self._phases: list[Phase] = []
        self._begin("forward", None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            # Checks of values that ask for a yes; counts and labels are 0.
            return args[0].dtype is torch.bool
        if func is aten.nonzero.default:
            out: Any = torch.empty(self._label_tokens, 1, dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def disregard(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leave tensors out that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage

    def begin(self, name: str, block: int | None) -> None:
        """End the phase that is and begin another, unless it is the same."""
        if (name, block) != (self._name, self._block):
            self._end()
            self._begin(name, block)

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """Take the gradient of a parameter out of the activations."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        size = self._sizes.pop(id(storage), 0)
        self._live -= size
        self._gradients += size

    def ended(self) -> list[Phase]:
        """All phases, the last one ended."""
        self._end()
        return self._phases

    def _begin(self, name: str, block: int | None) -> None:
        self._name, self._block = name, block
        self._held = self._peak = self._peak_with_gradients = self._live
        self._gradients_before = self._gradients

    def _end(self) -> None:
        self._phases.append(
            Phase(
                self._name,
                self._block,
                self._held,
                self._peak,
                self._peak_with_gradients,
                self._gradients - self._gradients_before,
                self._live,
            )
        )

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        self._peak = max(self._peak, self._live)
        gradients = self._gradients - self._gradients_before
        self._peak_with_gradients = max(self._peak_with_gradients, self._live + gradients)

    def _forget(self, key: int) -> None:
        del self._known[key]
        self._live -= self._sizes.pop(key, 0)


@contextlib.contextmanager
def _watched(model: nn.Module, blocks: list[DecoderLayer], memory: _LiveMemory) -> Iterator[None]:
    """Say to the memory which phase begins, and what is a gradient."""
    state = {"backward": False}

    def enter(index: int) -> Callable[..., None]:
        def hook(*unused: Any) -> None:
            # In the backward it is the recomputation of a block whose backward has begun.
            if not state["backward"]:
                memory.begin("forward", index)

        return hook

    def leave(index: int) -> Callable[..., None]:
        def backward(gradient: torch.Tensor) -> None:
            state["backward"] = True
            memory.begin("backward", index)

        def hook(block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if index == len(blocks) - 1 and not state["backward"]:
                memory.begin("loss", None)
            if output.requires_grad:
                output.register_hook(backward)

        return hook

    def below(block: nn.Module, inputs: Any) -> None:
        if not state["backward"] and inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: memory.begin("backward", None))

    hooks = [block.register_forward_pre_hook(enter(index)) for index, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(leave(index)) for index, block in enumerate(blocks)]
    hooks.append(blocks[0].register_forward_pre_hook(below))
    hooks += [p.register_post_accumulate_grad_hook(memory.is_gradient) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_contents(model: nn.Module) -> None:
    """Put fake tensors in the place of those on the meta device, shared ones once; inside the fake mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    fake: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    # The original is kept, so that its id is not given to another.
                    made[id(tensor)] = (tensor, fake)
                if tensor is not None:
                    held[name] = made[id(tensor)][1]


def _tensors(batch: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in batch.values() if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def _few_chunks() -> Iterator[None]:
    """Let the loss look at the first two chunks of tokens and the last: those between need the same memory."""
    # The package of the first has a function of the module's name.
    modules: list[Any] = [importlib.import_module("difftune.ops.linear_cross_entropy"), losses]

    def few(count: int, rows: int) -> list[int]:
        starts = list(chunk_starts(count, rows))
        return starts if len(starts) <= 3 else [*starts[:2], starts[-1]]

    for module in modules:
        module.chunk_starts = few
    try:
        yield
    finally:
        for module in modules:
            module.chunk_starts = chunk_starts


@contextlib.contextmanager
def _kernels_of_a_gpu(model: nn.Module) -> Iterator[None]:
    """Let attention and norms keep what the kernels of a GPU keep."""
    original = layers_module.rms_norm
    layers_module.rms_norm = _FusedNorm.apply
    try:
        with attention_calls(model, _attend_on_gpu):
            yield
    finally:
        layers_module.rms_norm = original


def fused_kernels_cover(half: bool, head_dim: int, value_head_dim: int) -> bool:
    """Whether the Triton kernels take heads of such widths, in 16 bits or not, on the newest GPU that they know."""
    return half and (head_dim, value_head_dim) in TILES[max(TILES)]


def _attend_on_gpu(call: AttentionCall) -> torch.Tensor:
    """Our fused kernels where they cover it, else torch's or flash-attn's, which both keep q, k, v, out and lse."""
    half = torch.is_autocast_enabled("cpu") or call.q.dtype in (torch.bfloat16, torch.float16)
    if call.lam is not None and fused_kernels_cover(half, call.q.shape[-1], call.v.shape[-1]):
        return triton_diff_attention(
            call.q,
            call.k,
            call.v,
            call.lam,
            causal=True,
            key_padding_mask=None,
            documents=call.documents,
            scale=call.q.shape[-1] ** -0.5,
            norm_weight=call.norm_weight,
            norm_eps=call.norm_eps,
        )
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else call.q.dtype
    outputs = []
    for q, k in call.maps:
        # Values wider than the keys are cut, one call each.
        pieces = call.v.split(q.shape[-1], dim=-1)
        parts = [_Attention.apply(q.to(dtype), k.to(dtype), piece.to(dtype)) for piece in pieces]
        outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
    if call.lam is None:
        return outputs[0]
    out = torch.addcmul(outputs[0], outputs[1], -call.lam.to(dtype)[..., None])
    return out if call.norm_weight is None else F.rms_norm(out, out.shape[-1:], call.norm_weight.to(dtype))


class _Attention(torch.autograd.Function):
    """An attention whose memory is that of flash-attn; it computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _FusedNorm(torch.autograd.Function):
    """A norm whose memory is that of torch's fused kernel; it computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        wants = ctx.needs_input_grad
        return torch.empty_like(x) if wants[0] else None, torch.empty_like(weight) if wants[1] else None, None
