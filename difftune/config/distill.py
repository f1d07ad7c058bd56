"""The keys of `distill` in a recipe."""

from dataclasses import dataclass

from difftune.config.field import key as _key


@dataclass
class DistillConfig:
    """Learning from a teacher's distribution beside the labels."""

    teacher: str | None = _key(None, is_path=True)
    """Folder or hub id of a model with the student's tokenizer, ours or transformers'. null: no distillation."""
    weight: float = _key(0.5, above=0, high=1)
    """Weight of the divergence; the cross entropy has the rest of 1."""
    divergence: str = _key("forward_kl", choices=("forward_kl", "reverse_kl", "generalized_jsd"))
    """`forward_kl` is KL(teacher, student), `reverse_kl` KL(student, teacher)."""
    temperature: float = _key(1.0, above=0)
    """Divides the logits of both; the divergence is multiplied by its square."""
    beta: float = _key(0.5, above=0)
    """Weight of the teacher in the mixture of `generalized_jsd`, below 1."""
    top_k: int | None = _key(None, low=1)
    """Train on so many tokens of the teacher, stored by `difftune prepare --teacher`. null: the teacher runs beside."""
    align_weight: float = _key(0.0, low=0)
    """Weight, at the first step, of matching attention outputs to those of the teacher that the student was made of."""
    align_steps: int = _key(0, low=0)
    """Optimiser steps over which that weight falls to 0."""
    stored_dtype: str = _key("float16", choices=("float16", "float32"))
    """Of stored log-probabilities."""
    teacher_dtype: str | None = _key(None, choices=("float32", "bfloat16", "float16"))
    """Of the teacher's weights in memory. null: as stored."""
    teacher_quantization: str | None = _key(None, choices=("nf4",))
    """Hold the teacher's projections in 4 bits and compute in `teacher_dtype`; needs the extra `qlora`. null: plain."""
    on_policy_share: float = _key(0.0, low=0, high=1)
    """Share of the batches whose answers the student writes itself, sampled at temperature 1 from the batch's prompts;
    the teacher judges every token of them (GKD). 0: none, and 1: all. Such a batch has no cross entropy."""
    on_policy_max_new_tokens: int = _key(256, low=1)
    """Longest such answer in tokens; shorter where it would not fit the row."""
