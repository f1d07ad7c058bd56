import inspect

import pytest
from transformers import DynamicCache, LlamaForCausalLM

from difftune.modeling.compat import CACHE, one_cache


def test_the_name_is_the_one_that_transformers_own_models_use():
    assert CACHE in inspect.signature(inspect.unwrap(LlamaForCausalLM.forward)).parameters


def test_either_name_gives_the_cache_and_both_are_refused():
    cache = DynamicCache()
    assert one_cache(cache, None) is cache and one_cache(None, cache) is cache and one_cache(None, None) is None
    with pytest.raises(ValueError, match="two names of one argument"):
        one_cache(cache, cache)
