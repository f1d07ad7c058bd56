"""From a config to the objects of a distillation: the teacher, what is stored of it, the module."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from difftune.builder.on_policy import StudentSampler
from difftune.checkpoints.adapter_config import tokenizer_folder
from difftune.checkpoints.load import load_teacher
from difftune.checkpoints.teacher_shards import load_sharded_teacher
from difftune.config import DistillConfig, StageConfig
from difftune.data.teacher_store import TeacherSettings
from difftune.data.tokenizers import build_tokenizer, require_same_tokens
from difftune.modeling import DiffTransformerForCausalLM
from difftune.training.distill import DistillModule
from difftune.training.teachers import OnlineTeacher


def teacher_settings(stage: StageConfig) -> TeacherSettings | None:
    """What is stored of the teacher of a stage; None if nothing is."""
    distill = stage.distill
    if distill.teacher is None or distill.top_k is None:
        return None
    return TeacherSettings(
        teacher=distill.teacher,
        quantization=distill.teacher_quantization,
        top_k=distill.top_k,
        temperature=distill.temperature,
        seq_len=stage.data.seq_len,
        overlong=stage.data.overlong,
        dtype=distill.stored_dtype,
    )


def build_teacher(
    stage: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    device: str = "cpu",
    *,
    sharded: bool = False,
) -> OnlineTeacher:
    """The teacher of a stage, loaded and checked.

    Args:
        stage: Names it.
        tokenizer: The student's.
        vocab_size: Rows of the student's head.
        device: "meta" builds it without weights.
        sharded: Leave its weights to be read by each rank when it has been sharded, where that can be done.

    Raises:
        ValueError: If it cannot be loaded or cannot teach this student.
    """
    distill = stage.distill
    assert distill.teacher is not None, "asked for only where there is one"
    theirs = build_tokenizer(tokenizer_folder(distill.teacher))
    require_same_tokens(tokenizer, theirs, distill.teacher)
    dtype = None if distill.teacher_dtype is None else getattr(torch, distill.teacher_dtype)
    if sharded and distill.teacher_quantization is None:
        skeleton, load_weights = load_sharded_teacher(distill.teacher, dtype)
        return OnlineTeacher(skeleton, vocab_size=vocab_size, load_weights=load_weights)
    model = load_teacher(distill.teacher, dtype, quantization=distill.teacher_quantization, device=device)
    return OnlineTeacher(model, vocab_size=vocab_size)


def loss_options(distill: DistillConfig) -> dict[str, Any]:
    """What of a teacher's section says how its divergence counts: keyword arguments of `DistillModule`."""
    names = ("divergence", "weight", "temperature", "beta", "align_weight", "align_steps")
    return {name: getattr(distill, name) for name in names}


def build_distill_module(
    stage: StageConfig,
    model: DiffTransformerForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> DistillModule:
    """The module of a stage that has a teacher.

    Args:
        stage: The stage.
        model: The student. The teacher of one on the meta device that nothing will fill is built there too.
        tokenizer: The student's.
        options: Those of :class:`~difftune.training.finetune.FinetuneModule`.
    """
    distill, teacher, on_policy = stage.distill, None, None
    if distill.top_k is None:
        # Filled when it is sharded, and the teacher with it; without, a dry run.
        sharded = "load_weights" in options
        device = "meta" if next(model.parameters()).is_meta and not sharded else "cpu"
        teacher = build_teacher(stage, tokenizer, model.config.vocab_size, device, sharded=sharded)
    if distill.on_policy_share:
        on_policy = StudentSampler(
            tokenizer,
            seq_len=stage.data.seq_len,
            max_new_tokens=distill.on_policy_max_new_tokens,
            seed=stage.seed,
        )
    return DistillModule(
        model,
        teacher=teacher,
        **loss_options(distill),
        on_policy=on_policy,
        on_policy_share=distill.on_policy_share,
        **options,
    )
