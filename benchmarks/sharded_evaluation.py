"""Wall time of writing texts with a model that is sharded over ranks: the ways of an evaluation, and the naive one.

python -m benchmarks.sharded_evaluation [--ranks 2] [--prompts 32] [--new-tokens 48] [--hidden-size 256] [--layers 4]

`sharded` calls the sharded model for every token, as `generate` does under FSDP by itself: every layer is exchanged at
every token, and each rank goes on with dummy tokens until the longest text of any rank's batch has ended. `by layers`
is what an evaluation does where a whole copy does not fit, `whole` where it does (the time to gather it included). The
texts end at different lengths, and all three ways must write the same before any time is printed.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig, LogitsProcessorList

from benchmarks.common import ROOT, machine, ratios, spread, table
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation import replicas
from difftune.evaluation.generation import generate_texts
from difftune.evaluation.sampling import OwnDraws, row_seed
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.training.sharding import shard_model

# So few that a text of nearly even odds ends after about as many tokens.
_VOCABULARY = 40
_TEMPERATURE = 1000.0
_BATCH_SIZE = 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.result is not None:
        _be_a_rank(args)
        return
    if args.prompts % (args.ranks * _BATCH_SIZE):
        raise SystemExit(
            f"--prompts must be a multiple of {args.ranks * _BATCH_SIZE}: the naive way needs equal shares"
        )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.pt"
        names = ("prompts", "new_tokens", "hidden_size", "layers", "rounds")
        sizes = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        command += ["-m", "benchmarks.sharded_evaluation", f"--result={result}", *sizes]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode or not result.exists():
            raise SystemExit(f"the ranks failed with code {done.returncode}:\n{done.stderr[-4000:]}")
        found = torch.load(result)
    print(
        f"Sampled texts of a model sharded over {args.ranks} ranks by FSDP2, float32, hidden {args.hidden_size}, "
        f"{args.layers} layers, {args.prompts} prompts in batches of {_BATCH_SIZE}, {found['lengths']} new tokens"
    )
    print(f"{machine(1, 'transformers')}; gloo; {args.rounds} rounds in turn, median (range)\n")
    baseline = found["seconds"]["sharded"]
    rows = [[way, spread(s), spread(ratios(baseline, s), 1)] for way, s in found["seconds"].items()]
    print(table(["way", "seconds", "times sharded"], rows))


def _be_a_rank(args: argparse.Namespace) -> None:
    """Time all ways; rank 0 writes the seconds, which are those of the slowest rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = DiffTransformerConfig(
        vocab_size=_VOCABULARY,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = DiffTransformerForCausalLM(config).eval()
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard_model(model, mesh)
    draw = random.Random(0)
    prompts = [[draw.randrange(6, _VOCABULARY) for _ in range(draw.randint(16, 64))] for _ in range(args.prompts)]
    # The same lengths in a batch, as generate_texts makes them.
    prompts.sort(key=len)
    numbers = list(range(rank, len(prompts), world))
    own = [prompts[number] for number in numbers]
    ways: dict[str, Callable[[], list[int]]] = {
        "sharded": lambda: _naive(model, own, numbers, args.new_tokens),
        "by layers": lambda: _evaluated(model, own, numbers, args.new_tokens, fits=False),
        "whole": lambda: _evaluated(model, own, numbers, args.new_tokens, fits=True),
    }
    lengths = {name: way() for name, way in ways.items()}
    if any(found != lengths["sharded"] for found in lengths.values()):
        raise SystemExit(f"the ways write texts of different lengths: {lengths}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            dist.barrier()
            begun = time.perf_counter()
            way()
            dist.barrier()
            seconds[name].append(time.perf_counter() - begun)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, lengths["sharded"])
    if rank == 0:
        flat = [length for part in everyone for length in part]
        torch.save({"seconds": seconds, "lengths": f"{min(flat)} to {max(flat)}"}, args.result)
    dist.destroy_process_group()


def _evaluated(
    model: DiffTransformerForCausalLM, prompts: list[list[int]], numbers: list[int], new_tokens: int, *, fits: bool
) -> list[int]:
    """As a scheduled evaluation does; tokens of each text."""
    room = 1 << 60 if fits else 0
    replicas.free_bytes = lambda device, ranks_per_machine: room
    with replicas.plain_weights(model, device=torch.device("cpu"), ranks_per_machine=1) as evaluated:
        found = generate_texts(
            evaluated.model,
            build_tokenizer("bytes"),
            prompts,
            max_new_tokens=new_tokens,
            batch_size=_BATCH_SIZE,
            temperature=_TEMPERATURE,
            numbers=numbers,
        )
        evaluated.finish()
    return [text.num_tokens for text in found]


@torch.no_grad()
def _naive(model: Any, prompts: list[list[int]], numbers: list[int], new_tokens: int) -> list[int]:
    """The sharded model itself, all ranks in step; tokens of each text."""
    tokenizer = build_tokenizer("bytes")
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    lengths = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        width = max(map(len, prompts[batch]))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts[batch]])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts[batch]])
        seeds = [row_seed(0, number) for number in numbers[batch]]
        draws = OwnDraws(seeds, width, new_tokens, _TEMPERATURE, 1.0)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([draws]),
            synced_gpus=True,
        )
        for row in output[:, width:].tolist():
            ended = tokenizer.eos_token_id in row
            lengths.append(row.index(tokenizer.eos_token_id) + 1 if ended else len(row))
    return lengths


if __name__ == "__main__":
    main()
