import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

from difftune.modeling.cache import build_cache
from tests.evaluation.scripted import tiny_model


def states(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, length, 4, generator=generator), torch.randn(2, 3, length, 5, generator=generator)


def test_it_holds_what_transformers_own_cache_holds() -> None:
    ours, theirs = build_cache(), DynamicCache()
    for number, length in enumerate((7, 1, 1, 200, *[1] * 100, 3)):
        found = ours.update(*states(length, number), 0)
        for a, b in zip(found, theirs.update(*states(length, number), 0), strict=True):
            assert torch.equal(a, b)
    assert ours.get_seq_length(0) == theirs.get_seq_length(0) == 312


def test_a_token_is_written_in_place_until_the_room_is_used_up() -> None:
    cache, places = build_cache(), []
    for number in range(400):
        places.append(cache.update(*states(1, number), 0)[0].data_ptr())
    assert 2 <= len(set(places)) <= 7


@pytest.mark.parametrize("change", ["crop", "reorder_cache", "batch_select_indices", "reset"])
def test_it_goes_on_after_its_tensors_were_replaced(change: str) -> None:
    arguments = {"crop": (-2,), "reset": ()}.get(change, (torch.tensor([1, 0]),))
    ours, theirs = build_cache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*states(6), 0)
        getattr(cache, change)(*arguments)
    for number in (1, 2):
        for a, b in zip(ours.update(*states(1, number), 0), theirs.update(*states(1, number), 0), strict=True):
            assert torch.equal(a, b)


def test_repeated_rows_go_on_apart() -> None:
    ours, theirs = build_cache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*states(6), 0)
        cache.batch_repeat_interleave(3)
    new = [torch.cat([states(1, seed)[part] for seed in range(3)]) for part in (0, 1)]
    for a, b in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("deep", [True, False])
def test_a_copy_of_a_layer_and_the_layer_both_go_on(deep: bool) -> None:
    cache = build_cache()
    cache.update(*states(6), 0)
    layer = cache.layers[0]
    other = copy.deepcopy(layer) if deep else copy.copy(layer)
    mine, theirs = layer.update(*states(1, 1)), other.update(*states(1, 2))
    for part in (0, 1):
        assert torch.equal(mine[part], torch.cat((states(6)[part], states(1, 1)[part]), dim=2))
        assert torch.equal(theirs[part], torch.cat((states(6)[part], states(1, 2)[part]), dim=2))


def test_every_second_token_can_be_kept() -> None:
    cache = build_cache()
    cache.update(*states(6), 0)
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    for found, old, new in zip(cache.update(*states(1, 1), 0), states(6), states(1, 1), strict=True):
        assert torch.equal(found, torch.cat((old[:, :, ::2], new), dim=2))


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_states_of_another_type_lose_nothing(types: tuple[torch.dtype, torch.dtype]) -> None:
    ours, theirs = build_cache(), DynamicCache()
    for number, dtype in enumerate(types):
        new = [state.to(dtype) for state in states(3, number)]
        for a, b in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2", "softmax"])
def test_a_model_computes_the_same_with_it(kind: str) -> None:
    model, ids = tiny_model(kind).eval(), torch.arange(6, 86).view(2, 40)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        cache, parts = build_cache(), []
        for piece in ids.split([30, 1, 1, 8], dim=1):
            parts.append(model(input_ids=piece, past_key_values=cache).logits)
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-4 * expected.abs().max()
