"""What the supported versions of transformers call differently."""

import dataclasses
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
"""Name of the key/value cache as an argument of forwards and ``generate``, and in outputs: ``cache`` from 5.24 on."""


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a caller gave, under either name.

    Raises:
        ValueError: If both names hold one.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache
