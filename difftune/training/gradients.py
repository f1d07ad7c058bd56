"""Scale and clip the gradients of an optimiser step in one pass over them."""

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def rescale_and_clip_(
    gradients: Sequence[torch.Tensor], scale: torch.Tensor, max_norm: float | None = None
) -> torch.Tensor:
    """Multiply ``gradients`` by ``scale``, then shrink them to the norm ``max_norm``, in place.

    Equals ``torch._foreach_mul_(gradients, scale)`` followed by ``torch.nn.utils.clip_grad_norm_``, without
    reading the gradients a third time and without waiting for the device.

    Args:
        gradients: At least one tensor; sharded ones (DTensor) count with all their shards. They may be on several
            devices, where some are kept on the host.
        scale: Scalar tensor.
        max_norm: Largest 2-norm over all gradients together. None: no clipping.

    Returns:
        The norm after scaling and before clipping, shape ``()``: NaN or infinite if any gradient is.

    Example:
        >>> gradient = torch.tensor([30.0, 40.0])
        >>> rescale_and_clip_([gradient], torch.tensor(0.1), max_norm=1.0), gradient
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    assert gradients, "an optimiser step needs at least one gradient"
    norm = _total_norm(gradients).to(scale.device)
    # In bfloat16 the factor itself would be off by up to 0.4%.
    dtype = torch.promote_types(norm.dtype, torch.float32)
    norm = norm.to(dtype) * scale.to(dtype)
    factor = scale.to(dtype)
    if max_norm is not None:
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        by_device.setdefault(local.device, []).append(local)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))
    return norm


def _total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all of them: those that each rank has whole, and those that are sharded, a mesh at a time."""
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else get_total_norm(whole)
