"""Peak memory of a conversion that does not fit into memory as a whole: layers of a 7B Llama, in bfloat16, sharded.

python -m benchmarks.convert [--layers 2 6] [--shard-gb 1] [--hidden-size 4096] [--folder DIR]

For each number of layers a checkpoint of random weights is written, then converted to DIFF V2 and compared with its
source in float32, as `difftune convert` does, in a process of its own. The peak must not grow with the depth: what is
held is one output shard and one layer, and for the comparison one layer, embedding and head in float32.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.common import PeakMemory, machine, report, run_child, table


def write_source(folder: Path, layers: int, hidden_size: int, shard_gb: float) -> tuple[float, float]:
    """A Llama of random weights, written as it is drawn; GB of all weights, and of one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from difftune.checkpoints.shards import write_shards

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 128,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else _random(shape)

    write_shards(drawn(), folder, max_shard_bytes=int(shard_gb * 1e9))
    config.save_pretrained(folder)
    size = {name: 2e-9 * shape.numel() for name, shape in shapes.items()}
    return sum(size.values()), sum(gb for name, gb in size.items() if name.startswith("model.layers.0."))


def _random(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.035, 0.035)


def measure(source: Path, out: Path, shard_gb: float) -> None:
    """One conversion in this process; reports memory to the parent."""
    from difftune.checkpoints.convert import convert_checkpoint

    torch.set_num_threads(1)
    memory, started = PeakMemory(), time.perf_counter()
    conversion = convert_checkpoint(source, "diff_v2", out, max_shard_bytes=int(shard_gb * 1e9))
    (difference,) = conversion.differences
    report(
        seconds=time.perf_counter() - started,
        above_start_gb=memory.above_start_gib * 1.073741824,
        total_gb=memory.total_gib * 1.073741824,
        difference=difference.max_abs_logit / difference.logit_scale,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; default the temporary folder")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return measure(*args.child, args.shard_gb)

    rows = []
    for layers in args.layers:
        work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
        try:
            weights_gb, layer_gb = write_source(work / "source", layers, args.hidden_size, args.shard_gb)
            child = ["--child", str(work / "source"), str(work / "out"), "--shard-gb", str(args.shard_gb)]
            result = run_child("benchmarks.convert", child, threads=1)
        finally:
            shutil.rmtree(work)
        figures = [weights_gb, layer_gb, args.shard_gb, result["above_start_gb"], result["total_gb"]]
        rows.append([str(layers), *[f"{gb:.2f}" for gb in figures], f"{result['seconds']:.0f}"])
        rows[-1].append(f"{result['difference']:.1e}")
    print(f"Conversion to DIFF V2 and comparison with the source: Llama of hidden {args.hidden_size}, bfloat16")
    print(machine(1, "transformers", "safetensors"))
    header = ["layers", "weights GB", "layer GB", "shard GB", "peak above start GB", "process GB", "s", "difference"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
