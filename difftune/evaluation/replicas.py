"""A sharded model as plain one, for as long as an evaluation takes.

A model that is sharded over ranks (FSDP2, tensor parallelism) exchanges weights whenever a layer runs, so all ranks
would have to run the same number of forwards, one a token. An evaluation therefore gets a twin of the model: the same
modules with plain weights, and nothing that training holds is touched.

* Where a whole copy fits, each rank gathers one, and is then on its own: **whole**. It fits if it takes at most half
  of the free memory, the rest being for caches and activations; on the CPU the ranks of a machine share its memory.
  On an accelerator float32 becomes bfloat16 (lambda stays); on the CPU weights keep the dtype of training.
* Where it does not, a layer is gathered when it is needed and let go after: **by layers**. Ranks that need different
  layers, or have nothing left to do, take part in every exchange: layers come in turn, round after round, until all
  ranks are done. Embedding, head and norm are gathered once.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

_MARKS = ("__composable", "_is_fsdp", "_fsdp")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TABLES = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


class Evaluated:
    """What an evaluation runs on: a model with plain weights.

    Args:
        model: The model.
        how: What was gathered, and why, for the log; empty if nothing was.
        turns: The exchanges of a model that is gathered by layers.
    """

    def __init__(self, model: nn.Module, how: str = "", turns: "_Turns | None" = None) -> None:
        self.model, self.how, self._turns = model, how, turns

    def finish(self) -> None:
        """To be called by each rank whose forwards are done, whatever their number; the others may go on."""
        if self._turns is not None:
            self._turns.serve()


@contextmanager
def plain_weights(model: nn.Module, *, device: torch.device, ranks_per_machine: int) -> Iterator[Evaluated]:
    """The model as all of it is on each rank; itself, if it is not sharded.

    All ranks enter and leave together. What is done to the modules in between is lost. Weights are as they are at the
    entry; nothing of the model that is trained changes, and the copy is freed at the end.

    Args:
        model: A causal language model, sharded or not.
        device: Where the copy lies, and over which the ranks talk.
        ranks_per_machine: How many share a machine's memory.
    """
    if not is_sharded(model):
        yield Evaluated(model)
        return
    for module in model.modules():
        # The last forward may have left some gathered.
        if isinstance(module, FSDPModule):
            module.reshard()
    size, free = replica_bytes(model, device), free_bytes(device, ranks_per_machine)
    fits = torch.tensor(int(size <= free // 2), device=device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    sizes = f"{size / 2**30:.2f} GiB, with {free / 2**30:.2f} GiB free on {device.type}"
    with torch.no_grad():
        evaluated = _gathered(model, device, sizes) if fits else _by_layers(model, device, sizes)
    try:
        yield evaluated
    finally:
        for parameter in evaluated.model.parameters():
            # At once, whoever still has the module.
            parameter.data = parameter.data.new_empty(0)


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank has only a part of some weight."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def replica_bytes(model: nn.Module, device: torch.device) -> int:
    """Memory of a whole copy of the weights."""
    named = model.named_parameters()
    return sum(parameter.numel() * _dtype(name, parameter, device).itemsize for name, parameter in named)


def free_bytes(device: torch.device, ranks_per_machine: int) -> int:
    """Memory that this rank can still use on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // ranks_per_machine


def _dtype(name: str, parameter: torch.Tensor, device: torch.device) -> torch.dtype:
    narrow = device.type != "cpu" and parameter.dtype == torch.float32 and "lambda_full" not in name
    return torch.bfloat16 if narrow else parameter.dtype


def _gather(name: str, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The whole of a parameter; all ranks take part."""
    tensor: Any = parameter.detach()
    if isinstance(tensor, DTensor):
        # A shard kept on the host cannot be exchanged there.
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    # A copy in any case: what the evaluation has is not what is trained.
    return tensor.to(device, _dtype(name, parameter, device), copy=True)


def _gather_together(parameters: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The whole of some parameters, by name, in one exchange for each dtype and mesh of those split by rows."""
    whole: dict[str, torch.Tensor] = {}
    alike: dict[tuple[torch.dtype, DeviceMesh], dict[str, DTensor]] = {}
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) and parameter.placements == (Shard(0),):
            # A projection of lambda may be divided over other ranks than the rest of its layer.
            alike.setdefault((_dtype(name, parameter, device), parameter.device_mesh), {})[name] = parameter
        else:
            whole[name] = _gather(name, parameter, device)
    for (dtype, mesh), tensors in alike.items():
        # Every rank but the last ones has as many rows, rounded up.
        rows = {name: -(-tensor.shape[0] // mesh.size()) for name, tensor in tensors.items()}
        sizes = [rows[name] * math.prod(tensor.shape[1:]) for name, tensor in tensors.items()]
        mine = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for part, tensor in zip(mine.split(sizes), tensors.values(), strict=True):
            local = tensor.to_local().flatten()
            part[: local.numel()] = local
        everyone = mine.new_empty(mesh.size() * mine.numel())
        dist.all_gather_into_tensor(everyone, mine, group=mesh.get_group())
        parts = everyone.view(mesh.size(), -1).split(sizes, dim=1)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True):
            whole[name] = part.reshape(-1, *tensor.shape[1:])[: tensor.shape[0]]
    return whole


def _gathered(model: nn.Module, device: torch.device, sizes: str) -> Evaluated:
    tensors = {id(p): _gather(name, p, device) for name, p in model.named_parameters()}
    return Evaluated(_twin(model, tensors, {}), f"each rank gathers a whole copy ({sizes})")


def _by_layers(model: nn.Module, device: torch.device, sizes: str) -> Evaluated:
    layers = model.get_decoder().layers  # type: ignore[operator]  # of a transformers model
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    tensors = {
        id(p): torch.empty(0, device=device, dtype=_dtype(name, p, device))
        if id(p) in inside
        else _gather(name, p, device)
        for name, p in model.named_parameters()
    }
    twins: dict[int, nn.Module] = {}
    twin = _twin(model, tensors, twins)
    turns = _Turns(layers, device)
    for index, layer in enumerate(layers):
        turns.attach(index, twins[id(layer)])
    return Evaluated(
        twin, f"layers are gathered in turn, all ranks in step: a whole copy does not fit ({sizes})", turns
    )


class _Turns:
    """Layers gathered in turn on all ranks; a rank waits for the turn of the layer that it needs.

    A vote opens each round: whether any rank still has something to do. A rank that is in a round stays to its end.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers: list[dict[str, torch.Tensor]] = [dict(layer.named_parameters()) for layer in layers]
        self._device = device
        self._next = 0

    def attach(self, index: int, twin: nn.Module) -> None:
        """Have the weights of a layer there whenever it runs."""

        def fill(module: nn.Module, arguments: Any) -> None:
            weights = self._wait_for(index)
            for name, parameter in module.named_parameters():
                parameter.data = weights[name]

        def empty(module: nn.Module, arguments: Any, output: Any) -> None:
            for parameter in module.parameters():
                parameter.data = parameter.data.new_empty(0)

        twin.register_forward_pre_hook(fill)
        twin.register_forward_hook(empty, always_call=True)

    def serve(self) -> None:
        """Take part until no rank needs anything."""
        while self._next or self._vote(active=False):
            self._take()

    def _wait_for(self, index: int) -> dict[str, torch.Tensor]:
        while True:
            if self._next == 0:
                self._vote(active=True)
            turn, weights = self._take()
            if turn == index:
                return weights

    def _take(self) -> tuple[int, dict[str, torch.Tensor]]:
        turn = self._next
        self._next = (turn + 1) % len(self._layers)
        with torch.no_grad():
            # The name inside the layer says whether it is lambda's.
            return turn, _gather_together(self._layers[turn], self._device)

    def _vote(self, *, active: bool) -> bool:
        votes = torch.tensor(int(active), device=self._device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)


def _twin(module: nn.Module, tensors: dict[int, torch.Tensor], twins: dict[int, nn.Module]) -> nn.Module:
    """The module as it was before it was sharded, with other weights: ``tensors`` by the id of the sharded one.

    Tied weights stay tied. Buffers, config and other attributes are those of the module itself.
    """
    parameters: dict[int, nn.Parameter] = {key: nn.Parameter(t, requires_grad=False) for key, t in tensors.items()}

    def copy(original: nn.Module) -> nn.Module:
        if id(original) in twins:
            return twins[id(original)]
        # fully_shard puts a class of its own before that of the module.
        kind = next(base for base in type(original).__mro__ if not issubclass(base, FSDPModule))
        twin: Any = kind.__new__(kind)
        # With its marks, generate() would take the twin for sharded, and exchange something at every token.
        state = {name: value for name, value in vars(original).items() if not name.startswith(_MARKS)}
        state["_parameters"] = {
            name: None if parameter is None else parameters[id(parameter)]
            for name, parameter in original._parameters.items()
        }
        state["_buffers"] = dict(original._buffers)
        # Tables of their own, or a hook of the twin would be noted in those of the module.
        state |= {name: table.copy() for name, table in state.items() if name.endswith(_TABLES)}
        state |= {name: _without_exchanges(state[name]) for name in _HOOKS}
        # What was compiled in place would run the module itself.
        state.pop("_compiled_call_impl", None)
        vars(twin).update(state)
        twins[id(original)] = twin
        vars(twin)["_modules"] = {
            name: None if child is None else copy(child) for name, child in original._modules.items()
        }
        return twin

    return copy(module)


def _without_exchanges(hooks: "OrderedDict[int, Any]") -> "OrderedDict[int, Any]":
    """Forward hooks but those by which torch.distributed gathers and scatters."""
    return OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if not (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith("torch.distributed")
    )
