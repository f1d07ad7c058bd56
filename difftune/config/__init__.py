"""Recipes: every key with its meaning, unit and range, and what loads a file of them, strictly.

The names below are what the rest of difftune reads a recipe with; the files beside this one are how it is done.
"""

from difftune.config.adapter import AdapterConfig
from difftune.config.distill import DistillConfig
from difftune.config.load import load_config
from difftune.config.recipe import Config, EvaluationConfig, ModelConfig, SourceConfig, StageConfig

__all__ = [
    "AdapterConfig",
    "Config",
    "DistillConfig",
    "EvaluationConfig",
    "ModelConfig",
    "SourceConfig",
    "StageConfig",
    "load_config",
]
