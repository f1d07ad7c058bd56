"""Distillations of a small student, by name: alone in the process of a test, or on several ranks as a worker."""

import os
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from torch.distributed.tensor import DTensor

from difftune.builder.on_policy import StudentSampler
from difftune.checkpoints.teacher_shards import load_sharded_teacher
from difftune.evaluation import replicas
from difftune.training.distill import DistillModule
from difftune.training.strategies import build_strategy
from difftune.training.teachers import OnlineTeacher
from tests.training.scale_ranks import Curve, whole
from tests.training.teaching import TOKENIZER, VOCABULARY, build_arithmetic, build_llama, build_student
from tests.training.toy import build_trainer

ROWS = 4
SCENARIOS = {
    "llama": {},
    "tied": {"tied": True},
    "ours": {"ours": True},
    "on_policy": {"share": 0.5},
    "on_policy_layers": {"share": 0.5, "room": 0},
}
"""What to train, by name: arguments of :func:`train`."""


def build_teacher(*, tied=False, ours=False, **unused):
    """The teacher of a scenario."""
    return build_student(seed=5, initializer_range=0.3) if ours else build_llama(tie_word_embeddings=tied)


def train(strategy, devices, *, folder=None, tied=False, ours=False, share=0.0, room=None):
    """Train one scenario for five steps; return its curve, its parameters, and which of the teacher's are sharded.

    With a folder the teacher is read from there, each rank its shards. ``room`` is the memory that a copy of a sharded
    student may think it has.
    """
    teacher, fill = build_teacher(tied=tied, ours=ours), None
    if folder is not None:
        teacher, fill = load_sharded_teacher(str(folder))
        assert fill is not None and teacher.device.type == "meta"
    student = build_student()
    seed_everything(3, verbose=False)
    sampler = StudentSampler(TOKENIZER, seq_len=64, max_new_tokens=8, seed=0) if share else None
    module = DistillModule(
        student,
        teacher=OnlineTeacher(teacher, vocab_size=VOCABULARY, load_weights=fill),
        weight=0.7,
        temperature=2.0,
        on_policy=sampler,
        on_policy_share=share,
        lr=3e-3,
        schedule="constant",
    )
    curve = Curve()
    trainer = build_trainer(
        [curve],
        devices=devices,
        strategy=build_strategy(strategy, devices=devices) if devices > 1 else "auto",
        max_steps=5,
        log_every_n_steps=1,
    )
    free_bytes = replicas.free_bytes
    if room is not None:
        replicas.free_bytes = lambda *unused: room
    try:
        trainer.fit(module, build_arithmetic(micro_batch_size=ROWS // devices))
    finally:
        replicas.free_bytes = free_bytes
    tensors = {**dict(teacher.named_parameters(remove_duplicate=False)), **dict(teacher.named_buffers())}
    return {
        "teacher": {name: whole(tensor) for name, tensor in tensors.items()},
        "loss": torch.tensor(curve.loss, dtype=torch.float64),
        "norm": torch.tensor(curve.norm, dtype=torch.float64),
        "logged": dict(module.logged),
        "parameters": {name: whole(p) for name, p in student.named_parameters()},
        "sharded": sorted(name for name, p in teacher.named_parameters() if isinstance(p, DTensor)),
    }


def main(arguments):
    """``FOLDER STRATEGY:SCENARIO ...``: train them one after the other; each rank saves its results."""
    folder, *names = arguments
    devices, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    for name in names:
        strategy, _, scenario = name.partition(":")
        teacher = Path(folder) / f"teacher-{scenario}" if strategy == "fsdp" else None
        results = train(strategy, devices, folder=teacher, **SCENARIOS[scenario])
        torch.save(results, Path(folder) / f"{strategy}-{scenario}-{rank}.pt")
