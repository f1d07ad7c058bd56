"""Tile sizes of each kernel, by architecture and head dim. A table: nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """What a kernel computes at a time: ``rows`` queries x ``columns`` keys, by ``warps`` warps."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As the arguments of a launch."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    """The tiles of one architecture and head dim."""

    forward: Tile
    keys: Tile
    """Of the kernel for the gradients of keys and values: a program holds ``columns`` keys and walks over queries."""
    queries: Tile
    """Of the kernel for the gradient of the queries."""
    sequential: bool = False
    """One map after the other in the forward, where two accumulators do not fit the registers."""
    descriptors: bool = False
    """The kernel for keys and values walks over queries by TMA instead of pointers, where they lie as TMA asks."""


SMALL = 0
"""Stands among the architectures for Triton's interpreter, where short inputs should have several tiles, and for
float32 on any GPU, of which larger tiles do not fit the shared memory."""

# (architecture, D, E): those that compile without spills in their main loops, or with the fewest (docs/kernels.md).
# Keys of an architecture are compute capabilities, 90 = H100.
_V1_90 = {
    32: Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    64: Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2), sequential=True, descriptors=True),
}
_V2_90 = {
    32: Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    64: Tiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)),
    128: Tiles(Tile(128, 32, 8, 3), Tile(32, 128, 8, 2), Tile(128, 32, 8, 2)),
}
_V1_80 = {
    32: Tiles(Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 32, 8, 2)),
    64: Tiles(Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 32, 8, 2)),
    128: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), sequential=True),
}
_V2_80 = {
    32: Tiles(Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 32, 8, 2)),
    64: Tiles(Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 32, 8, 2)),
    128: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2)),
}
_SMALL = {
    D: Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), sequential=D == 128) for D in (32, 64, 128)
}
TILES: dict[int, dict[tuple[int, int], Tiles]] = {
    SMALL: {(D, E): tiles for D, tiles in _SMALL.items() for E in (D, 2 * D)},
    80: {(D, kind * D): tiles for kind, table in ((1, _V2_80), (2, _V1_80)) for D, tiles in table.items()},
    90: {(D, kind * D): tiles for kind, table in ((1, _V2_90), (2, _V1_90)) for D, tiles in table.items()},
}
