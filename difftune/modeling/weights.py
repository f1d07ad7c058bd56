"""Dtype and number of the weights of a model."""

import torch
from torch import nn


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point weights in place, but lambda, which stays in float32; returns the model."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lambda_full" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of a model: ``total``, ``trainable``, and ``lambda`` (those of the lambda modules).

    Under an adapter, a module that is trained whole counts once, without its frozen original.
    """
    named = [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]
    return {
        "total": sum(p.numel() for _, p in named),
        "trainable": sum(p.numel() for _, p in named if p.requires_grad),
        "lambda": sum(p.numel() for name, p in named if "lambda_full" in name),
    }
