"""Trainings evaluated as they go on, by name: alone in a test's process, or on ranks as a worker of `ranks.py`.

Each returns what a test judges: samples and figures of every evaluation, and the course of the training.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from difftune.builder import build_tasks
from difftune.config import load_config
from difftune.data.problems import load_problems
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation import replicas
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.evaluation.early_stop import Patience
from difftune.evaluation.math import MathTask
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.training.strategies import build_strategy
from tests.evaluation.scripted import tiny_model
from tests.evaluation.toy_task import SquareTask
from tests.training.scale_ranks import Curve, whole
from tests.training.toy import ToyData, build_module, build_trainer

TOKENIZER = build_tokenizer("digits")
TERSE = "{style: terse, needles: 3, filler: 0, digits: 2}"
SUMS = "{path: 'synthetic:arithmetic', name: sums, limit: 5}"
KINDS = [
    SUMS,
    "{kind: needle, lengths: [300], depths: [0, 1], needles: 1, samples: 3, max_new_tokens: 3}",
    "{kind: nll, name: pages, path: 'synthetic:prose', limit: 3, length: 100, bins: 4}",
    "{kind: many_shot, name: toy, train: TRAIN, test: TRAIN, shots: [2]}",
    "{kind: activations, path: 'synthetic:arithmetic', limit: 20, num_tokens: 200, length: 50}",
    f"{{kind: attention_noise, num_samples: 1, options: {TERSE}}}",
    f"{{kind: quantization, bits: [16, 4], task: {SUMS}}}",
]


class Watched(MathTask):
    """Keeps the model that it was last run on, and how its weights were."""

    def run(self, model, tokenizer, **settings):
        self.model = model
        self.plain = all(type(p) in (torch.nn.Parameter, torch.Tensor) for p in model.parameters())
        return super().run(model, tokenizer, **settings)


def sums(**changes):
    problems = load_problems("synthetic:arithmetic", limit=5)
    return Watched("sums", problems, **{"max_new_tokens": 24, "batch_size": 2, **changes})


def all_kinds(folder, kinds=KINDS):
    rows = [{"text": f"{label} {n}", "label": label} for n in range(2) for label in ("up", "down")]
    path = Path(folder) / f"train-{os.getpid()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ", ".join(kinds).replace("TRAIN", str(path))
    settings = ["model.path=m", f"evaluation.tasks=[{text}]", "evaluation.max_new_tokens=4", "evaluation.batch_size=2"]
    return build_tasks(load_config(None, settings, command="evaluate").evaluation)


def train(
    strategy,
    devices,
    tasks,
    *,
    steps=4,
    every=2,
    kind="diff_v1",
    lora=False,
    room=None,
    patience=None,
    should_stop=None,
    **changes,
):
    """Train and evaluate; ``room`` is the memory that a copy may think it has."""
    torch.set_num_threads(1)
    model = tiny_model(kind, max_position_embeddings=512, **changes)
    if lora:
        seed_everything(4, verbose=False)
        add_adapter(model, AdapterSettings(rank=4, alpha=8))
    curve, seen, stopper = Curve(), [], None
    if patience is not None:
        stopper = Patience("eval/sums/mean_length", "max", patience)

    def on_result(trainer, metrics):
        kept = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
        seen.append((trainer.global_step, metrics, kept == {n: float(torch.tensor(v)) for n, v in metrics.items()}))
        if stopper is not None:
            stopper.on_evaluation(trainer, metrics)

    evaluation = None
    if tasks:
        evaluation = ScheduledEvaluation(
            tasks, TOKENIZER, every_n_steps=every, on_result=on_result, should_stop=should_stop
        )
    callbacks = [curve, *([evaluation] if evaluation else []), *([stopper] if stopper else [])]
    module = build_module(model=model, lr=3e-3)
    trainer = build_trainer(
        callbacks,
        devices=devices,
        strategy=build_strategy(strategy, devices=devices) if devices > 1 else "auto",
        max_steps=steps,
        log_every_n_steps=1,
    )
    free_bytes = replicas.free_bytes
    if room is not None:
        replicas.free_bytes = lambda *unused: room
    try:
        trainer.fit(module, ToyData(rows=8))
    finally:
        replicas.free_bytes = free_bytes
    results = evaluation.results if evaluation else {}
    return {
        "loss": curve.loss,
        "parameters": {name: whole(p) for name, p in module.model.named_parameters()},
        "samples": {s: {n: [asdict(x) for x in r.samples] for n, r in all_.items()} for s, all_ in results.items()},
        "seen": seen,
        "how": evaluation._how if evaluation else "",
        "training": [name for name, m in module.model.named_modules() if not m.training],
        "pending": evaluation._pending if evaluation else False,
        "watched": [
            (task.plain, task.model is module.model, sum(p.numel() for p in task.model.parameters()))
            for task in tasks
            if isinstance(task, Watched)
        ],
    }


def stopped_on_one(strategy, devices, folder, room=None):
    """The last rank alone is told to stop, after its sixth block of the evaluation after step 2; so far is rank 0 too.

    Rank 0 then takes its time: without the news it would need 20 seconds to the end.
    """
    rank = int(os.environ.get("RANK", "0"))
    begun, told = (Path(folder) / f"{what}-{room}" for what in ("begun", "told"))

    def act(count):
        if rank == 0 and count == 105:
            begun.touch()
        elif rank == 0 and count == 106:
            wait_for(told)
        elif rank == 0 and count > 106:
            time.sleep(0.25)
        elif count == 105:
            wait_for(begun)

    def should_stop():
        if rank == 0 or len(task.done) <= 105:
            return False
        told.touch()
        return True

    task = SquareTask(size=400, act=act)
    found = train(strategy, devices, [task], steps=3, should_stop=should_stop, room=room)
    return {**found, "blocks": len(task.done)}


def wait_for(path):
    """Until another rank has made the file; a hang ends the test."""
    while not path.exists():
        time.sleep(0.01)


def failing_on_one(strategy, devices, room=None):
    """Rank 1 alone fails, while the other has seconds of work left."""
    rank = int(os.environ.get("RANK", "0"))

    class Failing(Watched):
        def run_block(self, model, tokenizer, indices, clock):
            if rank == devices - 1:
                raise KeyError("no such label")
            return super().run_block(model, tokenizer, indices, clock)

    task = Failing("sums", load_problems("synthetic:arithmetic", limit=60), max_new_tokens=200, batch_size=1)
    try:
        train(strategy, devices, [task], room=room)
    except (KeyError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


SCENARIOS = {
    "whole": lambda s, n, f: train(s, n, [sums()]),
    "unwatched": lambda s, n, f: train(s, n, []),
    "layers": lambda s, n, f: train(s, n, [sums(max_new_tokens=16)], steps=2, room=0),
    "diff_v2": lambda s, n, f: train(s, n, [sums()], steps=2, kind="diff_v2", tie_word_embeddings=True),
    "lora": lambda s, n, f: train(s, n, [sums()], lora=True),
    "sampled": lambda s, n, f: train(s, n, [sums(temperature=1.0, top_p=0.9, num_samples=2)], steps=2),
    "kinds": lambda s, n, f: train(s, n, all_kinds(f), steps=1, every=1),
    # Without the kinds that write texts: an exchange a layer and token takes long here.
    "kinds_layers": lambda s, n, f: train(s, n, all_kinds(f, KINDS[2:6]), steps=1, every=1, room=0),
    "patience": lambda s, n, f: train(s, n, [sums(max_new_tokens=3)], steps=9, every=1, patience=2),
    "stopped": lambda s, n, f: stopped_on_one(s, n, f),
    "stopped_layers": lambda s, n, f: stopped_on_one(s, n, f, room=0),
    "failing": lambda s, n, f: failing_on_one(s, n),
    "failing_layers": lambda s, n, f: failing_on_one(s, n, room=0),
}
"""What to train, by name: called with the strategy, the number of devices and a folder to write to."""


def main(arguments):
    """``FOLDER STRATEGY:SCENARIO ...``: one after the other; each rank saves its results."""
    folder, *names = arguments
    devices, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for name in names:
        strategy, _, scenario = name.partition(":")
        begun = time.monotonic()
        found = SCENARIOS[scenario](strategy, devices, folder)
        torch.save(found, Path(folder) / f"{strategy}-{scenario}-{rank}.pt")
        print(f"{name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        torch.distributed.barrier()
