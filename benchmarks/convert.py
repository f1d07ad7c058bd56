"""Peak memory of a conversion that does not fit into memory as a whole: layers of a 7B Llama, in bfloat16, sharded.

python -m benchmarks.convert [--layers 2 6] [--shard-gb 1] [--hidden-size 4096] [--folder DIR]

For each number of layers a checkpoint of random weights is written, then converted to DIFF V2 and compared with its
source in float32, as `difftune convert` does, in a process of its own. The peak must not grow with the depth: what is
held is one output shard and one layer, and for the comparison one layer in both dtypes, and the head in float32.
`--layers 32` is a whole 7B model: 14 GB of source and 15 GB of result, which the disk must have.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import PeakMemory, machine, report, run_child, table

_GB = 2**30 / 1e9


def source_config(layers: int, hidden_size: int) -> Any:
    """A Llama of 7B where hidden_size is 4096 and there are 32 layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 128,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )


def sizes_gb(layers: int, hidden_size: int) -> tuple[float, float, float]:
    """GB of the source, of one of its layers, and of the result."""
    from transformers import LlamaForCausalLM

    from difftune.checkpoints.llama import config_from_llama
    from difftune.checkpoints.upcycle import config_to_v2
    from difftune.modeling import DiffTransformerForCausalLM

    config = source_config(layers, hidden_size)
    with torch.device("meta"):
        source = LlamaForCausalLM(config)
        result = DiffTransformerForCausalLM(config_to_v2(config_from_llama(config)))
    source_gb, layer_gb, result_gb = (
        2e-9 * sum(parameter.numel() for parameter in module.parameters())
        for module in (source, source.model.layers[0], result)
    )
    return source_gb, layer_gb, result_gb


def require_disk(folder: Path, source_gb: float, result_gb: float) -> None:
    """Leave with an error unless both checkpoints fit, with a gigabyte to spare."""
    needed, free = source_gb + result_gb + 1, shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise SystemExit(
            f"{folder} has {free:.1f} GB free, needed are {needed:.1f}: a source of {source_gb:.1f}, a result of "
            f"{result_gb:.1f}, and 1 to spare; name another --folder, or fewer --layers"
        )


def write_source(folder: Path, layers: int, hidden_size: int, shard_gb: float) -> None:
    """A Llama of random weights, written as it is made: each layer is the first one with its rows moved."""
    from transformers import LlamaForCausalLM

    from difftune.checkpoints.shards import write_shards

    config = source_config(layers, hidden_size)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        first: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
            elif name.startswith("model.layers."):
                _, _, layer, leaf = name.split(".", 3)
                if leaf not in first:
                    first[leaf] = _random(shape)
                yield name, first[leaf].roll(int(layer), 0)
            else:
                yield name, _random(shape)

    write_shards(made(), folder, max_shard_bytes=int(shard_gb * 1e9))
    config.save_pretrained(folder)


def _random(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.035, 0.035)


def measure(source: Path, out: Path, shard_gb: float) -> None:
    """One conversion in this process; reports memory to the parent."""
    from difftune.checkpoints import convert

    torch.set_num_threads(1)
    memory, started = PeakMemory(), time.perf_counter()
    start_gib, peaks = memory.start_gib, {}
    whole_compare = convert.compare

    def compare(*args: Any) -> Any:
        """The comparison, with the peak before it kept and its own counted anew."""
        peaks["writing"] = memory.total_gib
        own = PeakMemory()
        found = whole_compare(*args)
        peaks["comparing"] = own.total_gib
        return found

    convert.compare = compare
    try:
        conversion = convert.convert_checkpoint(source, "diff_v2", out, max_shard_bytes=int(shard_gb * 1e9))
    finally:
        convert.compare = whole_compare
    (difference,) = conversion.differences
    report(
        seconds=time.perf_counter() - started,
        writing_gb=(peaks["writing"] - start_gib) * _GB,
        comparing_gb=(peaks["comparing"] - start_gib) * _GB,
        total_gb=max(peaks.values()) * _GB,
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
    parent = args.folder or Path(tempfile.gettempdir())
    for layers in args.layers:
        source_gb, layer_gb, result_gb = sizes_gb(layers, args.hidden_size)
        require_disk(parent, source_gb, result_gb)
        with tempfile.TemporaryDirectory(prefix="convert-", dir=parent) as work:
            source, out = Path(work) / "source", Path(work) / "out"
            write_source(source, layers, args.hidden_size, args.shard_gb)
            child = ["--child", str(source), str(out), "--shard-gb", str(args.shard_gb)]
            result = run_child("benchmarks.convert", child, threads=1, timeout_s=7200)
        figures = [source_gb, result_gb, layer_gb, args.shard_gb]
        figures += [result["writing_gb"], result["comparing_gb"], result["total_gb"]]
        rows.append([str(layers), *[f"{gb:.2f}" for gb in figures], f"{result['seconds']:.0f}"])
        rows[-1].append(f"{result['difference']:.1e}")
    print(f"Conversion to DIFF V2 and comparison with the source: Llama of hidden {args.hidden_size}, bfloat16")
    print("peaks: resident memory of the process above its start, files that are mapped included; whole: all of it")
    print(machine(1, "transformers", "safetensors"))
    header = ["layers", "source GB", "result GB", "layer GB", "shard GB", "peak writing", "peak comparing", "whole"]
    print(table([*header, "s", "difference"], rows))


if __name__ == "__main__":
    main()
