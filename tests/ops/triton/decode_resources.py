"""What the compiled decode kernel needs of a GPU, counted without one: `python -m tests.ops.triton.decode_resources`.

Prints counts as JSON. In a process of its own, since kernels that Triton's interpreter has imported do not compile.
"""

import contextlib
import io
import json
import os
import re
import tempfile
from typing import Any

from tests.ops.triton.resources import count, main_loops

# Architecture, head dim, pieces of the values (2: V1), query rows of a group, page size (0: none).
KERNELS = [
    (90, 64, 2, 1, 0),
    (90, 128, 2, 1, 0),
    (90, 128, 2, 32, 0),
    (90, 128, 2, 1, 64),
    (90, 128, 1, 1, 0),
    (80, 128, 2, 1, 0),
    (80, 128, 2, 32, 64),
]


def measure(arch: int, head_dim: int, halves: int, rows: int, page: int) -> dict[str, Any]:
    """Counts of the split kernel in bfloat16, causal, with padding and lengths."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from difftune.ops.triton.decode import split_kernel, tile_of

    tile = tile_of(head_dim, rows, halves, 2, arch, page > 0)
    constants = {
        "GROUP": 4, "D": head_dim, "HALVES": halves, "SHARED": halves == 1, "CAUSAL": True, "PAGE": page,
        "PADDED": True, "RAGGED": True, "ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages,
        "INTERPRET": False,
    }  # fmt: skip
    pointers = {"mask_ptr": "*i8", "lengths_ptr": "*i32", "table_ptr": "*i32", "out_ptr": "*fp32", "lse_ptr": "*fp32"}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(split_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        number = "fp32" if name == "scale" else "i32"
        signature[name] = pointers.get(name, "*bf16") if name.endswith("_ptr") else number
        if name.endswith("_ptr") or (name.startswith("stride_") and name not in ("stride_mb", "stride_tb")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(fn=split_kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
    loops = list(main_loops(compiled.asm["cubin"]))
    return {
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())),
        "spill_bytes": max(int(n) for n in re.findall(r"(\d+) bytes spill stores", log.getvalue())),
        "products_in_loops": sum(count(loop, r"HMMA\S*|HGMMA\S*") for loop in loops),
        "copies_in_loops": sum(count(loop, r"LDGSTS\S*") for loop in loops),
        "threads": 32 * tile.warps,
        "shared_bytes": compiled.metadata.shared,
    }


def main() -> None:
    """Measure all, and print."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET: its kernels cannot be compiled"
    with tempfile.TemporaryDirectory() as cache:
        # Read at the first compilation; a cached kernel would print no log.
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        print(json.dumps([measure(*kernel) for kernel in KERNELS]))


if __name__ == "__main__":
    main()
