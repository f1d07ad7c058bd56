"""What the compiled kernels need of a GPU's registers and shared memory, counted without a GPU.

`python -m tests.ops.triton.resources` compiles the kernels below for sm_90 and sm_80 and prints the counts as JSON;
with `--record` it keeps them in resources.json, under the version of Triton. The test compares with what was recorded.
Runs in a process of its own, since kernels that Triton's interpreter has imported cannot be compiled.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Not from conftest.py, which chooses Triton's interpreter when it is imported.
ROOT = Path(__file__).resolve().parents[3]
RECORD = Path(__file__).with_suffix(".json")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
FLOATS = {"lam_ptr", "weight_ptr", "lse1_ptr", "lse2_ptr", "delta1_ptr", "delta2_ptr"}
# Architecture, kernel and form, kind, head dim: the shapes that fill the register file.
KERNELS = [
    *((90, name, "v1", D) for D in (64, 128) for name in ("forward", "keys", "queries")),
    (90, "keys pointers", "v1", 128),
    *((90, name, "v2", 128) for name in ("forward", "keys")),
    *((80, name, "v1", D) for D in (64, 128) for name in ("forward", "keys")),
    (80, "queries", "v1", 128),
]


def counted_by(module: str) -> list[dict[str, Any]]:
    """What a module as this one prints, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    result = subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def compile_kernel(arch: int, name: str, kind: str, D: int, **features: bool) -> tuple[Any, str]:
    """A kernel as it is launched on bfloat16, causal, for one architecture; and ptxas's log.

    ``name`` is "forward", "keys" or "queries"; with " pointers", without the descriptors that the table asks for.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from difftune.ops.triton.backward_keys import keys_kernel
    from difftune.ops.triton.backward_queries import queries_kernel
    from difftune.ops.triton.forward import forward_kernel
    from difftune.ops.triton.tiles import TILES

    name, _, form = name.partition(" ")
    kernel = {"forward": forward_kernel, "keys": keys_kernel, "queries": queries_kernel}[name]
    E = 2 * D if kind == "v1" else D
    tiles = TILES[arch][D, E]
    tile = getattr(tiles, name)
    constants = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages, "D": D, "E": E, "GROUP": 1, "CAUSAL": True,
        "VARLEN": False, "PADDED": False, "SHARED": kind == "v2", "LAM_TOKEN": kind == "v2", "NORM": kind == "v1",
        "SEQUENTIAL": tiles.sequential, "INTERPRET": False, **features,
    }  # fmt: skip
    described = {}
    if tiles.descriptors and form != "pointers":
        described = {f"{x}_desc": f"tensordesc<bf16[1, 1, 1, {tile.rows}, {n}]>" for x, n in (("q", D), ("grad", E))}
        described |= dict.fromkeys(("lse_desc", "delta_desc"), f"tensordesc<fp32[1, 1, 1, {tile.rows}]>")
    absent = {"cu_ptr": "VARLEN", "mask_ptr": "PADDED", "weight_ptr": "NORM"}
    signature, values, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in described:
            signature[argument] = described[argument]
            continue
        if argument in constants or argument.endswith("_desc") or not constants.get(absent.get(argument, ""), True):
            signature[argument], values[argument] = "constexpr", constants.get(argument)
            continue
        if argument.endswith("_ptr"):
            special = {"cu_ptr": "*i32", "mask_ptr": "*i8"}
            signature[argument] = special.get(argument, "*fp32" if argument in FLOATS else "*bf16")
        else:
            signature[argument] = "fp32" if argument in ("scale", "eps") else "i32"
        if argument.endswith("_ptr") or argument.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
    return compiled, log.getvalue()


def main_loops(cubin: bytes) -> Iterator[list[str]]:
    """Instructions of every innermost loop of the machine code that holds a matrix product."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_[\w.]+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    jumps = [(re.search(r"\bBRA\b.*\.(L_[\w.]+)", text), end) for end, text in enumerate(instructions)]
    loops = [(labels[jump[1]], end) for jump, end in jumps if jump and labels.get(jump[1], end + 1) <= end]
    for start, end in loops:
        inner = any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
        body = instructions[start : end + 1]
        if not inner and count(body, "HGMMA|HMMA"):
            yield body


def count(instructions: list[str], pattern: str) -> int:
    """How many instructions hold one of the mnemonics."""
    return sum(bool(re.search(rf"\b({pattern})\b", text)) for text in instructions)


def measure(arch: int, name: str, kind: str, D: int, **features: bool) -> dict[str, Any]:
    """Counts of one kernel."""
    compiled, log = compile_kernel(arch, name, kind, D, **features)
    loops = list(main_loops(compiled.asm["cubin"]))
    return {
        "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
        "spill_bytes": max(int(n) for n in re.findall(r"(\d+) bytes spill stores", log)),
        "spills_in_main_loops": [count(loop, r"LDL\S*|STL\S*") for loop in loops],
        "hgmma": sum(count(loop, r"HGMMA\S*") for loop in loops),
        "hmma": sum(count(loop, r"HMMA\S*") for loop in loops),
        "shared_bytes": compiled.metadata.shared,
        "warnings": sorted(set(re.findall(r"\((C\d+)\)", log))),
    }


def measure_all() -> dict[str, Any]:
    """Counts of every kernel, by name."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET: its kernels cannot be compiled"
    with tempfile.TemporaryDirectory() as cache:
        # Read at the first compilation; a cached kernel would print no log.
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        return {f"sm_{a} {name} {kind} D={D}": measure(a, name, kind, D) for a, name, kind, D in KERNELS}


def main() -> None:
    """Measure, and print or record."""
    import triton

    result = measure_all()
    if "--record" in sys.argv:
        recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        recorded[triton.__version__] = result
        RECORD.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
