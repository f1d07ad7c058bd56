"""Adapters: LoRA beside frozen projections, lambda trained whole, all of it through PEFT.

PEFT keeps the frozen weight of an adapted projection as ``base_layer`` beside ``lora_A`` and ``lora_B``, and the
frozen copy of a module that is trained whole as ``original_module`` beside ``modules_to_save``. The functions here
read both back under the model's own names, so that nobody else needs to know.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from difftune.modeling.adapter_settings import (
    BRANCH,
    BRANCHES,
    EMBEDDINGS,
    LAMBDA,
    NO_TARGETS,
    AdapterSettings,
    build_lora_config,
)
from difftune.modeling.lambdas import WARMUP_STEP
from difftune.modeling.modeling import DiffTransformerForCausalLM
from difftune.modeling.quantized import dequantized_weight, num_weights

_PREFIX = "base_model.model."
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")


def add_adapter(
    model: DiffTransformerForCausalLM | PeftModel, settings: AdapterSettings | LoraConfig, name: str = "default"
) -> PeftModel:
    """Freeze the model and attach an adapter to it, in place; the adapter is active and trainable.

    LoRA, lambda and norms are float32 whatever the dtype of the model; a trained embedding keeps the model's.
    At the start the function of the model does not change.

    Args:
        model: The base, or one that has adapters already.
        settings: What to train.
        name: A Python identifier, unlike those that are there.

    Returns:
        PEFT's wrapper around the same modules; ``get_base_model()`` is the model, with the adapter inside.

    Raises:
        ValueError: If the settings do not fit the model or the name is taken.

    Example:
        >>> adapted = add_adapter(model, AdapterSettings(ranks={"positive": 16, "negative": 8}))  # doctest: +SKIP
    """
    if not name.isidentifier() or name in "lora_":
        raise ValueError(f"adapter name {name!r} must be a Python identifier, and no part of 'lora_', such as 'maths'")
    existing = getattr(model, "peft_config", {})
    if name in existing:
        raise ValueError(f"the model has an adapter {name!r} already: choose another name than {', '.join(existing)}")
    config = build_lora_config(model.config, settings) if isinstance(settings, AdapterSettings) else settings
    _check_warmup(model, config)
    # PEFT would freeze every parameter whose name contains the adapter's; activate_adapter decides who trains.
    config.inference_mode = False
    if isinstance(model, PeftModel):
        adapted = model
        adapted.add_adapter(name, config)
    else:
        # PEFT asks the model where it came from; transformers has "None" for one made of tensors.
        config.base_model_name_or_path = None
        model.name_or_path = model.config._name_or_path
        adapted = get_peft_model(model, config, adapter_name=name)
    for module_name, module in adapted.named_modules():
        is_whole = isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
        if is_whole and module_name.rpartition(".")[2] not in EMBEDDINGS:
            module.modules_to_save[name].float()
    _wake_dead_pairs(adapted, name)
    activate_adapter(adapted, name, trainable=True)
    return adapted


def activate_adapter(adapted: PeftModel, name: str, *, trainable: bool = False) -> None:
    """Make one adapter the active one; the others and the base are frozen.

    Args:
        adapted: A model with adapters.
        name: Of the adapter.
        trainable: Whether it is to be trained.

    Raises:
        ValueError: If there is no such adapter.
    """
    _check_name(adapted, name)
    adapted.set_adapter(name)
    adapted.requires_grad_(False)
    for parameter in trained_parameters(adapted, name).values():
        parameter.requires_grad_(trainable)


def trained_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter by the names of PEFT's files; a tied one has both of its names.

    Args:
        model: PEFT's wrapper, or the model with the adapter inside.
        name: Of the adapter.
    """
    found = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        key = file_key(full_name, name)
        if key is not None:
            found[key] = parameter
    return found


def saved_tensors(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """What is saved of an adapter, by the names of PEFT's files: its parameters, and the step of lambda's warm-up.

    Args:
        model: PEFT's wrapper, or the model with the adapter inside.
        name: Of the adapter.
    """
    found: dict[str, torch.Tensor] = {**trained_parameters(model, name)}
    for full_name, step in _warmup_steps(model).items():
        key = file_key(full_name, name)
        if key is not None:
            found[key] = step
    return found


def file_key(parameter_name: str, name: str = "default") -> str | None:
    """The name that a parameter has in PEFT's file, or None if it is not one of the adapter ``name``.

    Example:
        >>> file_key("model.layers.0.self_attn.q1_proj.lora_A.default.weight")
        'base_model.model.model.layers.0.self_attn.q1_proj.lora_A.weight'
    """
    key = re.sub(rf"\.lora_magnitude_vector\.{name}\.weight$", ".lora_magnitude_vector", parameter_name)
    key = re.sub(rf"\.(lora_A|lora_B)\.{name}\.", r".\1.", key)
    key = re.sub(rf"\.modules_to_save\.{name}\.", ".", key)
    return None if key == parameter_name else _PREFIX + key.removeprefix(_PREFIX)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The frozen tensors under adapters, by the names that they have without PEFT; nothing is copied."""
    found: dict[str, torch.Tensor] = {}
    for full_name, parameter in (*model.named_parameters(remove_duplicate=False), *_warmup_steps(model).items()):
        if _ADDED.search(full_name):
            continue
        plain = full_name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = parameter.detach()
    return found


def base_name(parameter_name: str) -> str | None:
    """The name, without adapters, of the weight that a parameter is or begins as; None for LoRA, which begins anew.

    Example:
        >>> base_name("model.layers.0.self_attn.lambda_full.modules_to_save.default.lambda_q1")
        'model.layers.0.self_attn.lambda_full.lambda_q1'
    """
    if ".lora_" in parameter_name:
        return None
    plain = parameter_name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    return re.sub(r"\.modules_to_save\.\w+\.", ".", plain)


def lora_layers(model: nn.Module, name: str) -> dict[str, Any]:
    """PEFT's layers that hold LoRA of the adapter ``name``, by the name of the projection without PEFT."""
    return {
        module_name.removeprefix(_PREFIX): module
        for module_name, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def lora_update(layer: Any, name: str) -> torch.Tensor:
    """``scaling * B @ A`` of a layer in float32 (float64 for float64 weights), shape ``(out, in)``."""
    lora_a, lora_b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    dtype = torch.promote_types(lora_a.dtype, torch.float32)
    return layer.scaling[name] * (lora_b.to(dtype) @ lora_a.to(dtype))


def merged_tensors(
    model: nn.Module, name: str = "default", *, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The weights with an adapter merged into them: computed in float32, then rounded once.

    Args:
        model: A model with the adapter; not changed.
        name: Of the adapter.
        dtype: Of the merged weights. Default: the base's.

    Returns:
        Tensor by the model's own name; those that the adapter leaves alone are the base's, not copies, in its dtype.

    Raises:
        ValueError: If the base is quantised.
    """
    merged = base_tensors(model)
    for key, tensor in saved_tensors(model, name).items():
        plain = key.removeprefix(_PREFIX)
        if plain in merged:
            merged[plain] = tensor.detach().to(dtype or merged[plain].dtype)
    for projection, layer in lora_layers(model, name).items():
        weight = merged[f"{projection}.weight"]
        if not weight.is_floating_point():
            raise ValueError(
                f"{projection} is quantised: load the adapter with load_with_base(..., base_as='dequantized'), "
                "and merge there"
            )
        update = lora_update(layer, name)
        total = weight.to(update.dtype) + update
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight.detach().to(update.dtype)
            total *= (magnitude / torch.linalg.norm(total, dim=1))[:, None]
        merged[f"{projection}.weight"] = total.to(dtype or weight.dtype)
    return merged


def combine_adapters(adapted: PeftModel, weights: Mapping[str, float], name: str) -> None:
    """Add the weighted sum of several adapters as a new one, active and frozen.

    Exact: ``A`` and ``B`` are stacked, so the ranks add up and the update is the weighted sum of the updates. Of
    modules trained whole (lambda, norms) the differences from the base are summed with the same weights.

    Args:
        adapted: Holds the adapters.
        weights: Weight by name of adapter.
        name: Of the new one.

    Raises:
        ValueError: If an adapter is unknown, uses DoRA (which is not a sum), a weight is not finite, or a warm-up of
            lambda has not ended.

    Example:
        >>> combine_adapters(adapted, {"maths": 0.7, "code": 0.3}, "both")  # doctest: +SKIP
    """
    if not weights:
        raise ValueError("give at least one adapter to combine, such as {'maths': 0.7, 'code': 0.3}")
    whole: set[str] = set()
    configs: dict[str, Any] = adapted.peft_config
    for part, weight in weights.items():
        _check_name(adapted, part)
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {part!r} must be finite, got {weight}")
        if configs[part].use_dora:
            raise ValueError(f"adapter {part!r} uses DoRA, whose updates do not add: merge it into the base instead")
        whole |= set(configs[part].modules_to_save or ())
        warm = {step.item() for key, step in saved_tensors(adapted, part).items() if key.endswith(WARMUP_STEP)}
        if warm and min(warm) < adapted.config.lambda_warmup_steps:
            raise ValueError(
                f"lambda of adapter {part!r} is at step {min(warm):.0f} of the {adapted.config.lambda_warmup_steps} of "
                "its warm-up, and a mixture has no such step: train it to the end of that first"
            )
    layers = {part: lora_layers(adapted, part) for part in weights}
    ranks: dict[str, int] = {}
    for projection in sorted(set().union(*layers.values())):
        rank = sum(layers[part][projection].r[part] for part in weights if projection in layers[part])
        leaf = projection.rpartition(".")[2]
        if ranks.setdefault(leaf, rank) != rank:
            raise ValueError(f"{leaf} has another rank in {projection} than in earlier layers: not combined")
    config = LoraConfig(
        r=max(ranks.values(), default=1),
        lora_alpha=max(ranks.values(), default=1),
        target_modules=sorted(ranks) or NO_TARGETS,
        rank_pattern=ranks,
        alpha_pattern=ranks,  # alpha = rank: a scaling of exactly 1
        modules_to_save=sorted(whole) or None,
        ensure_weight_tying=any(configs[part].ensure_weight_tying for part in weights),
    )
    add_adapter(adapted, config, name)
    base, sums = base_tensors(adapted), trained_parameters(adapted, name)
    parts = {part: trained_parameters(adapted, part) for part in weights}
    with torch.no_grad():
        for key, step in saved_tensors(adapted, name).items():
            if key.endswith(WARMUP_STEP):
                step.fill_(adapted.config.lambda_warmup_steps)
        for key, target in sums.items():
            plain = key.removeprefix(_PREFIX)
            if plain in base:
                held = [(w, parts[part][key]) for part, w in weights.items() if key in parts[part]]
                target.copy_(base[plain] + sum(w * (tensor - base[plain]) for w, tensor in held))
        for projection, layer in lora_layers(adapted, name).items():
            held_by = {part: layers[part][projection] for part in weights if projection in layers[part]}
            layer.lora_A[name].weight.copy_(torch.cat([held.lora_A[part].weight for part, held in held_by.items()]))
            scaled = [weights[part] * held.scaling[part] * held.lora_B[part].weight for part, held in held_by.items()]
            layer.lora_B[name].weight.copy_(torch.cat(scaled, dim=1))
    activate_adapter(adapted, name)


def count_adapter_parameters(adapted: nn.Module, name: str = "default") -> dict[str, int]:
    """Parameters of an adapter by group, the empty groups left out.

    Returns:
        ``lora positive``, ``lora negative``, ``lora shared``, ``lambda``, ``norms``, ``embeddings``, then ``trainable``
        (their sum) and ``total`` (with those of the base).
    """
    groups = dict.fromkeys((*(f"lora {branch}" for branch in BRANCHES), "lambda", "norms", "embeddings"), 0)
    unique = {id(parameter): (key, parameter) for key, parameter in trained_parameters(adapted, name).items()}
    for key, parameter in unique.values():
        parts = key.split(".")
        leaf = next((parts[i - 1] for i, part in enumerate(parts) if part.startswith("lora_")), None)
        if leaf is not None:
            group = f"lora {BRANCH.get(leaf, 'shared')}"
        elif LAMBDA in parts:
            group = "lambda"
        else:
            group = "embeddings" if parts[-2] in EMBEDDINGS else "norms"
        groups[group] += parameter.numel()
    counts = {group: count for group, count in groups.items() if count}
    trainable = sum(counts.values())
    added = sum(count for group, count in counts.items() if group.startswith("lora"))
    base = sum(num_weights(p) for full_name, p in adapted.named_parameters() if not _ADDED.search(full_name))
    return {**counts, "trainable": trainable, "total": base + added}


def describe_adapter(adapted: nn.Module, name: str = "default") -> str:
    """One line with the counts: ``trainable 5,120 of 81,920 (6.25%): lora negative 4,096, lambda 1,024``."""
    counts = count_adapter_parameters(adapted, name)
    trainable, total = counts.pop("trainable"), counts.pop("total")
    groups = ", ".join(f"{group} {count:,}" for group, count in counts.items())
    return f"trainable {trainable:,} of {total:,} ({trainable / total:.2%}): {groups}"


def _wake_dead_pairs(adapted: PeftModel, name: str) -> None:
    """Give life to a negative branch that is LoRA alone.

    Where the frozen ``q2_proj`` and ``k2_proj`` are both zero, and so is every new ``B``, each waits for the other:
    all their gradients are zero for ever. A random ``B`` in ``q2_proj`` ends that, and the scores, a product with the
    keys, are still zero at the start.
    """
    layers = lora_layers(adapted, name)
    for projection, layer in layers.items():
        if layer.get_base_layer().weight.is_meta:
            continue  # a skeleton, which has no values
        if name in layer.lora_magnitude_vector and not layer.lora_magnitude_vector[name].weight.all():
            raise ValueError(f"{projection} has rows that are zero, whose direction DoRA cannot keep: use_dora=false")
        partner = layers.get(projection.replace("q2_proj", "k2_proj"))
        if partner is None or not projection.endswith("q2_proj"):
            continue
        if not any(dequantized_weight(side.get_base_layer()).any() for side in (layer, partner)):
            nn.init.kaiming_uniform_(layer.lora_B[name].weight, a=math.sqrt(5))


def _warmup_steps(model: nn.Module) -> dict[str, torch.Tensor]:
    """The counters of lambda's warm-up, by full name; empty where there is none."""
    return {name: step for name, step in model.named_buffers() if name.endswith(f".{WARMUP_STEP}")}


def _check_warmup(model: nn.Module, config: LoraConfig) -> None:
    """Raise if lambda is in the middle of a warm-up and the adapter, which does not hold it, could not save its end."""
    steps = [step for step in base_tensors(model).items() if step[0].endswith(WARMUP_STEP)]
    if LAMBDA in (config.modules_to_save or ()) or not steps or steps[0][1].is_meta:
        return
    config_of_model: Any = model.config
    total, step = config_of_model.lambda_warmup_steps, int(steps[0][1])
    if step < total:
        raise ValueError(
            f"lambda of the base is at step {step} of the {total} of its warm-up, and an adapter that leaves lambda "
            "alone cannot save where it goes from there: train_lambda=true, or end it with model.lambda_warmup_steps=0"
        )


def _check_name(adapted: PeftModel, name: str) -> None:
    if name not in adapted.peft_config:
        raise ValueError(f"there is no adapter {name!r}: the model has {', '.join(adapted.peft_config)}")
