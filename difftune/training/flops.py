"""How much arithmetic a training step needs, and how much a device can do: the two halves of MFU."""

from dataclasses import dataclass

import torch
from torch import nn

from difftune.modeling import DiffTransformerForCausalLM

# Dense 16-bit matrix products with float32 accumulation, FLOP/s, from the vendor's data sheets. The first name that
# the device's name contains counts.
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "L4": 1.21e14,
    "A10G": 7.0e13,
    "RTX 4090": 1.65e14,
    "RTX 3090": 7.1e13,
}
"""Peak of devices in FLOP/s, by a part of their names."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of a device in FLOP/s, for the 16-bit precisions of CUDA devices that are known; else None."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass
class ModelFlops:
    """Arithmetic of a model in FLOP, a multiplication and an addition being two.

    The backward of a product is two products: the gradient of the weight, which a frozen one does not need, and that of
    its input, which nobody needs before the first trained weight. Where everything is trained, a backward is two
    forwards, but for the input of the first layer, which counts if the embedding is trained.

    Recomputation under gradient checkpointing does not count, nor do norms (DoRA's included), softmax and rotary
    embeddings.
    """

    per_token: float
    """Forward, a position: the matrix products of the layers."""
    per_label_token: float
    """Forward, a label token: the head, which is computed for those only."""
    per_attended_pair: float
    """Forward, a pair of positions of which one attends to the other: all maps of all layers."""
    backward_per_token: float
    """The same of the backward."""
    backward_per_label_token: float
    """The same of the backward."""
    backward_per_attended_pair: float
    """The same of the backward."""

    @classmethod
    def of_model(cls, model: DiffTransformerForCausalLM) -> "ModelFlops":
        """Count a model's products, those of adapters inside it too, and which of their gradients are needed."""
        config = model.config
        assert config.head_dim is not None, "the config derives it"
        width = 2 * config.head_dim if config.attention == "diff_v1" else config.head_dim
        pairs = 2.0 * config.num_attention_heads * (config.head_dim + width)
        forward = backward = backward_pairs = 0.0
        # Whether the hidden states, at the place where the walk stands, depend on a trained weight.
        live = _is_trained(model.model.embed_tokens)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            inner = {name: module for name, module in attention.named_children() if name != "o_proj"}
            of_maps = [module for name, module in inner.items() if name not in ("lambda_full", "subln")]
            live |= _is_trained(layer.input_layernorm)
            for modules, before in (
                (list(inner.values()), None),
                ([attention.o_proj], None),
                ([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm),
                ([mlp.down_proj], None),
            ):
                live |= before is not None and _is_trained(before)
                for module in modules:
                    products, gradients = _products(module, live)
                    forward, backward = forward + products, backward + gradients
                if modules[0] is of_maps[0] and (live or any(map(_is_trained, of_maps))):
                    backward_pairs += 2 * pairs
                live |= any(map(_is_trained, modules))
        live |= _is_trained(model.model.norm)
        head = 2.0 * config.vocab_size * config.hidden_size
        return cls(
            per_token=forward,
            per_label_token=head,
            per_attended_pair=pairs * config.num_hidden_layers,
            backward_per_token=backward,
            backward_per_label_token=head * (live + _is_trained(model.lm_head)),
            backward_per_attended_pair=backward_pairs,
        )

    def of_training(self, tokens: float, label_tokens: float, attended_pairs: float) -> float:
        """FLOP of forward and backward over so many positions, label tokens and attended pairs."""
        return (
            (self.per_token + self.backward_per_token) * tokens
            + (self.per_label_token + self.backward_per_label_token) * label_tokens
            + (self.per_attended_pair + self.backward_per_attended_pair) * attended_pairs
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _products(module: nn.Module, live: bool) -> tuple[float, float]:
    """FLOP a position of the matrix products in a module: forward, and those gradients that are needed.

    Args:
        module: A projection, with LoRA or without, or a lambda.
        live: Whether its input needs a gradient.
    """
    forward = backward = 0.0
    for name, linear in module.named_modules():
        # PEFT keeps the frozen original of what is trained whole.
        if not isinstance(linear, nn.Linear) or "original_module" in name:
            continue
        products = 2.0 * linear.in_features * linear.out_features
        trained = linear.weight.requires_grad
        # The input of lora_B is the output of lora_A, trained like it.
        needs_input = live or (trained and "lora_B" in name)
        forward += products
        backward += products * (trained + needs_input)
    return forward, backward
