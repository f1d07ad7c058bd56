"""Fine-tune, distil, evaluate and export Differential Transformers.

The public names are imported when first used: ``import difftune`` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "diff_attention": "difftune.ops",
    "softmax_attention": "difftune.ops",
    "linear_cross_entropy": "difftune.ops",
    "Documents": "difftune.ops",
    "DiffTransformerConfig": "difftune.modeling",
    "DiffTransformerForCausalLM": "difftune.modeling",
    "load_model": "difftune.checkpoints.load",
    "export_model": "difftune.checkpoints.export",
    "patch_diffllama": "difftune.checkpoints.patch_diffllama",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'difftune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
