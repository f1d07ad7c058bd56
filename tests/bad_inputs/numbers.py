"""Every key of a recipe that is a number, with what is no number, and what no run can have."""

import dataclasses
import types
import typing
from collections.abc import Iterator

from difftune.config.recipe import Config
from tests.bad_inputs.case import Case, fit

_HUGE = 10**30


def _numeric(target: type = Config, prefix: str = "") -> Iterator[tuple[str, set[type]]]:
    """Every dotted key that takes a number, and whether whole ones only."""
    for name, hint in typing.get_type_hints(target).items():
        options = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        section = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if section is not None:
            assert isinstance(section, type)
            yield from _numeric(section, f"{prefix}{name}.")
        elif options & {int, float}:
            yield prefix + name, options & {int, float}


def _generated() -> Iterator[Case]:
    beside = {"adapter": "model.path=model", "upsample": "data.upsample={}"}
    for key, kinds in _numeric():
        first = [text for name, text in beside.items() if name in key.split(".")]
        last = key.split(".")[-1]
        values: list[object] = [".inf", ".nan", "-.inf", "-7"]
        if kinds == {int}:
            values.append(_HUGE)
        for value in values:
            shown = str(value).removeprefix("-").removeprefix(".")
            yield fit(f"{key}={value}", *first, f"{key}={value}", says=(last, shown))


CASES: list[Case] = [
    *_generated(),
    # seeds are what NumPy takes
    fit("a seed of 2^32", "seed=4294967296", says=("seed", "4294967296", "4294967295")),
    fit("a seed below 0 in a stage", "stages=[{name: a, seed: -1}]", says=("seed", "-1")),
    fit("a seed of an evaluation of 2^64", "evaluation.seed=18446744073709551616", says=("seed", "4294967295")),
    fit("a learning rate of 0", "optim.lr=0", says=("optim.lr", "0")),
    fit("a first beta of 1", "optim.betas=[1, 0.9]", says=("optim.betas", "1", "less than 1")),
    fit("a second beta of 1", "optim.betas=[0.9, 1.0]", says=("optim.betas", "1", "less than 1")),
    fit("one beta", "optim.betas=[0.9]", says=("optim.betas", "2 items")),
    fit("three betas", "optim.betas=[0.9, 0.9, 0.9]", says=("optim.betas", "2 items")),
    fit("a beta that is nan", "optim.betas=[.nan, 0.9]", says=("optim.betas", "nan")),
    fit("no devices", "trainer.devices=0", says=("trainer.devices", "0")),
    fit("devices below 0", "trainer.devices=-2", says=("trainer.devices", "-2")),
    fit("an empty list of devices", "trainer.devices=[]", says=("trainer.devices", "[]")),
    fit("devices twice", "trainer.devices=[0, 0]", says=("trainer.devices", "twice")),
    fit("a device below 0", "trainer.devices=[-1]", says=("trainer.devices", "-1")),
    fit("devices as text", "trainer.devices=many", says=("trainer.devices", "many")),
    fit("devices as a broken list", "trainer.devices='0,,x'", says=("trainer.devices", "0,,x")),
    fit("an empty text of devices", "trainer.devices=''", says=("trainer.devices",)),
    fit("devices as a number in quotes", "trainer.devices='0'", says=("trainer.devices", "0")),
    fit("half a device", "trainer.devices=1.5", says=("trainer.devices", "1.5")),
    fit("true devices", "trainer.devices=true", says=("trainer.devices", "True")),
    fit("a million devices", "trainer.devices=1000000", says=("trainer.devices", "1000000")),
    fit(
        "more devices than there are, whatever they are",
        "trainer.accelerator=auto",
        "trainer.devices=4096",
        says=("trainer.devices", "4096"),
    ),
    fit("a list of devices on the CPU", "trainer.devices=[0, 1]", says=("trainer.devices", "number")),
    fit(
        "a GPU without one",
        "trainer.accelerator=gpu",
        says=("trainer.accelerator", "gpu", "cpu"),
        env={"CUDA_VISIBLE_DEVICES": ""},
    ),
    fit("CUDA without a GPU", "trainer.accelerator=cuda", says=("cuda", "cpu"), env={"CUDA_VISIBLE_DEVICES": ""}),
    fit("MPS elsewhere", "trainer.accelerator=mps", says=("mps", "cpu")),
    fit("eight GPUs without one", "trainer.accelerator=gpu", "trainer.devices=8", says=("8", "gpu")),
    fit("two machines without a launcher", "trainer.num_nodes=2", says=("trainer.num_nodes", "2", "torchrun")),
    fit("a million layers", "model.num_hidden_layers=1000000", says=("num_hidden_layers", "1000000")),
    fit("a width of a billion", "model.hidden_size=1000000000", says=("hidden_size", "1000000000")),
    fit(
        "a model that no memory holds", "model.hidden_size=65536", "model.num_hidden_layers=100", says=("GiB", "memory")
    ),
    fit(
        "an inner width that no memory holds",
        "model.intermediate_size=4194304",
        "model.num_hidden_layers=500",
        says=("GiB",),
    ),
    fit("a billion words", "model.vocab_size=1000000000000", says=("vocab_size", "1000000000000")),
    fit("a tiny fraction", "evaluation.every_fraction=1e-9", says=("every_fraction", "1e-09")),
    fit("a billion workers", "data.num_workers=1000000", says=("num_workers", "1000000")),
    fit("a row of a terabyte", "data.seq_len=1000000000000", "model.max_position_embeddings=null", says=("seq_len",)),
    fit(
        "a rank wider than the model",
        "model.path=model",
        "tokenizer=null",
        "model.path=model",
        "adapter.rank=100000000",
        says=("rank",),
        copies=("model",),
    ),
    fit("a rank of text", "adapter.ranks={negative: x}", "model.path=model", says=("ranks", "x")),
    fit(
        "a rank of a branch of 0",
        "adapter.ranks={negative: 0}",
        "model.path=model",
        "tokenizer=null",
        says=("ranks", "0"),
        copies=("model",),
    ),
    fit(
        "a rank of nowhere",
        "adapter.ranks={nowhere: 1}",
        "model.path=model",
        "tokenizer=null",
        says=("nowhere",),
        copies=("model",),
    ),
    fit(
        "an alpha that is nan",
        "adapter.alphas={negative: .nan}",
        "model.path=model",
        "tokenizer=null",
        says=("alpha", "nan"),
        copies=("model",),
    ),
    fit(
        "a dropout of 1",
        "adapter.dropout=1",
        "model.path=model",
        "tokenizer=null",
        says=("dropout", "1"),
        copies=("model",),
    ),
]
