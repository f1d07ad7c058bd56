import pytest

from difftune.ops.triton.tiles import SMALL, TILES

GPUS = [arch for arch in TILES if arch != SMALL]


def test_h100_and_a100_are_covered_with_the_head_dims_of_the_models():
    assert {80, 90} <= set(GPUS)
    for arch in GPUS:
        assert set(TILES[arch]) == {(D, kind * D) for D in (32, 64, 128) for kind in (1, 2)}


@pytest.mark.parametrize("arch", TILES)
def test_tiles_are_powers_of_two_that_a_matrix_product_takes(arch):
    for tiles in TILES[arch].values():
        for tile in (tiles.forward, tiles.keys, tiles.queries):
            assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.rows, tile.columns))
            assert tile.options == {
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "STAGES": tile.stages,
                "num_warps": tile.warps,
                "num_stages": tile.stages,
            }


@pytest.mark.parametrize("arch", GPUS)
def test_values_of_256_dims_take_one_map_after_the_other(arch):
    assert all(tiles.sequential == (E == 256) for (_, E), tiles in TILES[arch].items())
