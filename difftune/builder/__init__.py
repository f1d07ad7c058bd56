"""From a config to the objects of a run. Below here nothing reads a config.

The names below build a run; distillation and several devices have files of their own.
"""

from difftune.builder.model import (
    build_adapter,
    build_architecture,
    build_model,
    build_tokenizer,
    fresh_architecture,
)
from difftune.builder.stage import build_data, build_module, build_sources, build_tasks, build_trainer, total_steps

__all__ = [
    "build_adapter",
    "build_architecture",
    "build_data",
    "build_model",
    "build_module",
    "build_sources",
    "build_tasks",
    "build_tokenizer",
    "build_trainer",
    "fresh_architecture",
    "total_steps",
]
