"""Whether the settings of a rotary embedding can be computed with, before a model is made of them."""

import math
from collections.abc import Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""What a type needs beside ``rope_theta``; the lengths are filled from ``max_position_embeddings``."""
_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
)
_LISTS = ("short_factor", "long_factor")
KNOWN = ("rope_type", *_NUMBERS, *_LISTS, "mscale", "mscale_all_dim", "truncate")
"""The keys that transformers reads for these types."""


def check_rope(parameters: Mapping[str, Any] | None) -> None:
    """Check the settings of a rotary embedding.

    Args:
        parameters: ``{"rope_type": ..., "rope_theta": ...}`` as in transformers. None: the default.

    Raises:
        ValueError: If the type is unknown, something that it needs is missing, or a value is no number above 0.

    Example:
        >>> check_rope({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    """
    given = dict(parameters or {})
    rope_type = given.get("rope_type", given.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is unknown, choose one of {', '.join(ROPE_TYPES)}")
    missing = [name for name in NEEDED.get(rope_type, ()) if given.get(name) is None]
    if missing:
        raise ValueError(
            f"rope_parameters: rope_type={rope_type!r} needs {', '.join(missing)}, got {given}; give it, or "
            "rope_type='default'"
        )
    for name in _NUMBERS:
        if name in given and not _is_positive(given[name]):
            # Absent and null are one for all but the base, which the default is not known to.
            if given[name] is None and name != "rope_theta":
                continue
            raise ValueError(f"rope_parameters: {name} must be a finite number above 0, got {given[name]!r}")
    for name in _LISTS:
        values = given.get(name)
        if values is not None and not (isinstance(values, list | tuple) and all(map(_is_positive, values))):
            raise ValueError(f"rope_parameters: {name} must be a list of finite numbers above 0, got {values!r}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
