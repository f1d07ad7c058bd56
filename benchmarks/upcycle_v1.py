"""What a Llama loses when it becomes DIFF V1, for each way to initialise it: after the conversion, and after training.

python -m benchmarks.upcycle_v1 [--steps 300] [--recovery 50] [--hidden-size 128] [--seeds 3]

A small Llama is trained for some minutes on Python's standard library as bytes. Each way converts it; the loss is taken
on files that were held out, right away and after some steps of training, the same for all. In a warm-up lambda rises
from almost 0 to its value over the first half of those steps. Shown is how far the loss is above that of the Llama of
the same seed, which is trained on by as many steps: the median over the seeds, and the range.
"""

import argparse
import copy
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import machine, spread, table
from difftune.checkpoints.llama import config_from_llama
from difftune.checkpoints.streams import in_order
from difftune.checkpoints.upcycle import config_to_v1, config_to_v2, to_diff_v1, to_diff_v2
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.lambdas import warming_up

LENGTH, ROWS = 192, 8
SOURCE, WARM = "the Llama itself", ", warmed up"
Tensors = dict[str, torch.Tensor]


def library_bytes() -> tuple[torch.Tensor, torch.Tensor]:
    """Python's standard library: bytes for training, and the last twentieth for the loss."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    border = len(content) * 19 // 20
    return content[:border], content[border:]


def rows_of(content: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(content) - LENGTH, (rows,), generator=generator)
    return torch.stack([content[start : start + LENGTH] for start in starts])


def train(model: nn.Module, content: torch.Tensor, steps: int, lr: float, seed: int) -> nn.Module:
    """AdamW with a linear schedule, on rows that depend on the seed alone."""
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        ids = rows_of(content, ROWS, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for module in warming_up(model):
            module.advance()
    return model


@torch.no_grad()
def loss(model: nn.Module, content: torch.Tensor, count: int) -> float:
    model.eval()
    rows = rows_of(content, count, torch.Generator().manual_seed(0)).split(16)
    return sum(model(input_ids=ids, labels=ids).loss.item() for ids in rows) / len(rows)


def build(config: DiffTransformerConfig, tensors: Tensors) -> DiffTransformerForCausalLM:
    model = DiffTransformerForCausalLM(config)
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


def mirrored(config: DiffTransformerConfig, tensors: Tensors) -> None:
    """Both maps of a pair the first head's: the second head's pattern is lost."""
    for name in list(tensors):
        for kind in "qk":
            if f".{kind}2_proj." in name:
                tensors[name] = tensors[name.replace(f"{kind}2_proj", f"{kind}1_proj")].clone()


def unscaled(config: DiffTransformerConfig, tensors: Tensors) -> None:
    """The output projection as the source has it, without the scale of the heads' outputs."""
    for name in tensors:
        if name.endswith("o_proj.weight"):
            layer = name.removesuffix(".self_attn.o_proj.weight")
            values = tensors[f"{layer}.self_attn.v_proj.weight"] * tensors[f"{layer}.input_layernorm.weight"]
            groups = config.num_kv_groups
            scale = 0.5 * values.unflatten(0, (groups, -1)).square().sum(2).mean(1).sqrt()
            tensors[name] = (tensors[name].unflatten(1, (groups, -1)) / scale[:, None]).flatten(1)


def as_it_is(config: DiffTransformerConfig, tensors: Tensors) -> None:
    """What `difftune convert` writes."""


# Name, norm, lambda, what is changed after the conversion; "warmed up" in the name is read too.
WAYS: list[tuple[str, str, float | None, Callable[[DiffTransformerConfig, Tensors], None]]] = [
    ("no norm, lambda 0.05", "none", 0.05, as_it_is),
    (f"no norm, lambda 0.05{WARM}", "none", 0.05, as_it_is),
    ("no norm, lambda 0.1", "none", 0.1, as_it_is),
    ("no norm, lambda by depth", "none", None, as_it_is),
    (f"no norm, lambda by depth{WARM}", "none", None, as_it_is),
    ("no norm, lambda 0.1, second map a copy of the first", "none", 0.1, mirrored),
    ("no norm, lambda -1 (adds the maps)", "none", -1.0, as_it_is),
    ("norm, lambda 0.05", "plain", 0.05, as_it_is),
    (f"norm, lambda 0.05{WARM}", "plain", 0.05, as_it_is),
    ("norm, lambda by depth", "plain", None, as_it_is),
    (f"norm, lambda by depth{WARM}", "plain", None, as_it_is),
    ("norm, lambda by depth, heads not scaled", "plain", None, unscaled),
]


def llama_config(hidden_size: int, intermediate_size: int) -> LlamaConfig:
    """A Llama of four layers over bytes."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def measure(seed: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Loss after the conversion and after the training that follows, by way, from a Llama of this seed."""
    torch.manual_seed(seed)
    learned, held_out = library_bytes()
    config = llama_config(args.hidden_size, args.hidden_size * 11 // 4)
    source = train(LlamaForCausalLM(config), learned, args.steps, 3e-3, seed=2 * seed + 1)
    own = config_from_llama(config)
    tensors = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}

    def losses(model: nn.Module) -> tuple[float, float]:
        right_away = loss(model, held_out, args.held_out)
        trained = train(copy.deepcopy(model), learned, args.recovery, 5e-4, seed=2 * seed + 2)
        return right_away, loss(trained, held_out, args.held_out)

    found = {SOURCE: losses(source)}
    found["DIFF V2"] = losses(build(config_to_v2(own), dict(to_diff_v2(own, in_order(tensors)))))
    for name, subln, lambda_init, change in WAYS:
        steps = max(1, args.recovery // 2) if name.endswith(WARM) else 0
        target = config_to_v1(own, subln=subln, lambda_init=lambda_init, lambda_warmup_steps=steps)
        converted = dict(to_diff_v1(own, target, in_order(tensors)))
        change(target, converted)
        found[name] = losses(build(target, converted))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recovery", type=int, default=50)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=64, help="rows of 192 bytes for the loss")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = [measure(seed, args) for seed in range(args.seeds)]
    of_source = [spread([one[SOURCE][when] for one in found], 3) for when in (0, 1)]
    rows = []
    for name in found[0]:
        if name != SOURCE:
            lost = ([one[name][when] - one[SOURCE][when] for one in found] for when in (0, 1))
            rows.append([name, *[spread(values, 3) for values in lost]])
    print(
        f"Loss on held-out bytes above that of the Llama, nats: hidden {args.hidden_size}, 8 heads, 4 key/value, "
        f"{args.steps} steps; median of {args.seeds} seeds (range)"
    )
    print(f"The Llama itself: {of_source[0]}, after {args.recovery} more steps {of_source[1]}")
    print(machine(args.threads, "transformers"))
    print(table(["way", "after conversion", f"after {args.recovery} steps"], rows))


if __name__ == "__main__":
    main()
