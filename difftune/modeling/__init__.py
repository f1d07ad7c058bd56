"""The model: configuration, attention of the three kinds, causal language model; registered with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from difftune.modeling.configuration import DiffTransformerConfig
from difftune.modeling.modeling import DiffTransformerForCausalLM, DiffTransformerModel
from difftune.modeling.outputs import DiffCausalLMOutput
from difftune.modeling.weights import cast_weights, count_parameters

AutoConfig.register("difftune", DiffTransformerConfig, exist_ok=True)
AutoModel.register(DiffTransformerConfig, DiffTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(DiffTransformerConfig, DiffTransformerForCausalLM, exist_ok=True)

__all__ = [
    "DiffCausalLMOutput",
    "DiffTransformerConfig",
    "DiffTransformerForCausalLM",
    "DiffTransformerModel",
    "cast_weights",
    "count_parameters",
]
