"""Skeletons: what would be trained, without weights."""

from pathlib import Path

import pytest
import torch

from difftune.config import load_config
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.quantized import quantize_base, weight_bytes
from difftune.plan.model import architecture, build_skeleton, build_teacher_skeleton, tensor_bytes

SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def skeleton(*keys: str, num_layers: int | None = None):
    config = load_config(None, list(keys), command="plan")
    return build_skeleton(config, architecture(config), num_layers)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffTransformerForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("model")
    model = DiffTransformerForCausalLM(DiffTransformerConfig(**SHAPE, num_attention_heads=4, attention="diff_v2"))
    model.save_pretrained(folder)
    return model, folder


def test_a_skeleton_needs_the_config_of_a_model_and_not_its_weights(
    saved: tuple[DiffTransformerForCausalLM, Path], tmp_path: Path
) -> None:
    model, folder = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = skeleton(f"model.path={tmp_path}", "model.max_position_embeddings=999")
    assert all(p.is_meta for p in found.parameters()) and found.config.max_position_embeddings == 999
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in found.named_parameters()} == shapes
    assert tensor_bytes(found) == weight_bytes(model)
    assert len(skeleton(f"model.path={tmp_path}", num_layers=1).model.layers) == 1


def test_an_adapter_trains_what_it_trains_in_a_run(saved: tuple[DiffTransformerForCausalLM, Path]) -> None:
    found = skeleton(f"model.path={saved[1]}", "adapter.preset=attention", "adapter.rank=2")
    # A and B of q1, q2, k, v and o in float32, and lambda's projection, in two blocks.
    sizes = [(64, 32), (64, 32), (64, 32), (64, 32), (32, 64)]
    assert tensor_bytes(found, trained=True) == 4 * 2 * (sum(2 * (a + b) for a, b in sizes) + 2 * 64)


def test_weights_in_4_bits_take_what_bitsandbytes_takes(saved: tuple[DiffTransformerForCausalLM, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    real = DiffTransformerForCausalLM(saved[0].config)
    quantize_base(real, "nf4", compute_dtype=torch.float32)
    found = skeleton(f"model.path={saved[1]}", "model.quantization=nf4", "adapter.preset=lambda_only")
    for name in ("self_attn.q1_proj", "mlp.down_proj"):
        weight = real.model.layers[0].get_submodule(name).weight
        scales = weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
        assert tensor_bytes(found.model.layers[0].get_submodule(name)) == weight.nbytes + scales


def test_a_teacher_of_transformers_is_built_from_its_config(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**SHAPE, num_attention_heads=4, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    teacher = build_teacher_skeleton(str(tmp_path), "bfloat16")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in teacher.parameters())


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        skeleton(f"model.path={tmp_path}")
