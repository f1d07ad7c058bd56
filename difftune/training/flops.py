"""How much arithmetic a training step needs, and how much a device can do: the two halves of MFU."""

from dataclasses import dataclass

import torch

from difftune.modeling import DiffTransformerForCausalLM

# Dense 16-bit matrix products with float32 accumulation, FLOP/s, from the vendor's data sheets. The first name that
# the device's name contains counts.
_PEAKS = {
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


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of a device in FLOP/s, for the 16-bit precisions of CUDA devices that are known; else None."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


@dataclass
class ModelFlops:
    """Arithmetic of a model in FLOP, a multiplication and an addition being two; a backward is two forwards.

    Recomputation under gradient checkpointing does not count, nor do norms, softmax and rotary embeddings.
    """

    per_token: float
    """Forward, a position: the matrix products of the layers."""
    per_label_token: float
    """Forward, a label token: the head, which is computed for those only."""
    per_attended_pair: float
    """Forward, a pair of positions of which one attends to the other: all maps of all layers."""

    @classmethod
    def of_model(cls, model: DiffTransformerForCausalLM) -> "ModelFlops":
        """Count a model's parameters and maps."""
        config = model.config
        assert config.head_dim is not None, "the config derives it"
        matrices = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim == 2)
        width = 2 * config.head_dim if config.attention == "diff_v1" else config.head_dim
        maps = config.num_hidden_layers * config.num_attention_heads
        return cls(
            per_token=2.0 * matrices,
            per_label_token=2.0 * config.vocab_size * config.hidden_size,
            per_attended_pair=2.0 * maps * (config.head_dim + width),
        )

    def of_training(self, tokens: float, label_tokens: float, attended_pairs: float) -> float:
        """FLOP of forward and backward over so many positions, label tokens and attended pairs."""
        forward = (
            self.per_token * tokens + self.per_label_token * label_tokens + self.per_attended_pair * attended_pairs
        )
        return 3.0 * forward
