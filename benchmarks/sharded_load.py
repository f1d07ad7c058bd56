"""Peak memory of loading a checkpoint on several ranks, each its own shards: against one process that loads it whole.

python -m benchmarks.sharded_load [--ranks 2] [--layers 14] [--hidden-size 1024]

The checkpoint is made for the purpose, in float32, by default 1.0 GiB. Its file is sparse, so that writing it costs no
time; what a process reads of it takes memory as from any file. Counted is the peak of resident memory from before the
load (interpreter, libraries and process group are there) to after it, of the rank that has most: what it allocates, and
what it maps of the file meanwhile.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, PeakMemory, machine, report, table

WHOLE, SHARDED = "load_model, one process", "shard by shard"


def write_model(folder: Path, *, hidden_size: int, layers: int, vocab_size: int = 16_000) -> int:
    """Write a difftune folder of zeros, as one sparse safetensors file; return the bytes of the weights."""
    import torch

    from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

    config = DiffTransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiffTransformerForCausalLM(config).state_dict().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def load_here(folder: Path) -> float:
    """Load this rank's shards, of as many ranks as the environment says; return the peak beyond the start in GiB."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from difftune.checkpoints.sharded import fill_model, load_skeleton
    from difftune.training.sharding import shard_model

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    # The exchange's own buffers belong to the start.
    torch.distributed.barrier()
    gc.collect()
    memory = PeakMemory()
    model, weights = load_skeleton(folder)
    shard_model(model, mesh)
    fill_model(model, weights, "cpu")
    peak = memory.above_start_gib
    torch.distributed.destroy_process_group()
    return peak


def load_whole(folder: Path) -> float:
    """Load the model as one process does; return the peak beyond the start in GiB."""
    import torch

    from difftune.checkpoints.load import load_model

    torch.set_num_threads(1)
    gc.collect()
    memory = PeakMemory()
    model = load_model(folder)
    # Until they are read, the weights are a mapped file that takes no memory.
    assert all(torch.isfinite(parameter.sum()) for parameter in model.parameters())
    return memory.above_start_gib


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--child", choices=[WHOLE, SHARDED], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        load = load_whole if args.child == WHOLE else load_here
        return report(peak_gib=load(args.folder), rank=int(os.environ.get("RANK", 0)))

    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder), hidden_size=args.hidden_size, layers=args.layers) / 2**30
        peaks = {kind: max(_run(kind, folder, args.ranks if kind == SHARDED else 1)) for kind in (WHOLE, SHARDED)}
    rows = [
        [f"{kind}, {args.ranks} ranks" if kind == SHARDED else kind, f"{peak:.2f}", f"{peak / size:.2f}"]
        for kind, peak in peaks.items()
    ]
    print(machine(1, "transformers"))
    print(f"checkpoint of {size:.2f} GiB, float32\n")
    print(table(["load", "peak GiB of a process beyond its start", "of the checkpoint"], rows))


def _run(kind: str, folder: str, ranks: int) -> list[float]:
    """Peaks of all ranks."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "benchmarks.sharded_load", "--child", kind, "--folder", folder]
    alone = {} if launcher else {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    peaks = peaks_of(done.stdout)
    if done.returncode or len(peaks) != ranks:
        raise SystemExit(f"{kind} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
    return peaks


def peaks_of(output: str) -> list[float]:
    """What the ranks reported, from their output."""
    lines = [line for line in output.splitlines() if '"peak_gib"' in line]
    return [json.loads(line[line.index("{") :])["peak_gib"] for line in lines]


if __name__ == "__main__":
    main()
