import pytest
import torch

from difftune.checkpoints.adapter_base import BASES, describe_quantization, load_base
from difftune.modeling.quantized import quantization_of

NF4 = {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}


def test_a_base_comes_in_4_bits_dequantised_or_as_it_was(make_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model(hidden_size=64).save_pretrained(tmp_path)
    in_4_bits, plain, original = (load_base(tmp_path, NF4, kind, None, None) for kind in ("quantized", *BASES[::2]))
    assert quantization_of(in_4_bits) == NF4 == plain.dequantized_from
    assert quantization_of(plain) is None and plain.dtype == torch.bfloat16
    assert original.dtype == torch.float32 and not hasattr(original, "dequantized_from")
    wide = load_base(tmp_path, NF4, "dequantized", torch.float32, None)
    name = "model.layers.0.mlp.up_proj.weight"
    # The numbers of the training, in a wider type.
    assert torch.equal(wide.get_parameter(name), plain.get_parameter(name).float())
    assert not torch.equal(wide.get_parameter(name), original.get_parameter(name))


def test_unknown_kinds_are_refused_and_words_are_found(tmp_path):
    with pytest.raises(ValueError, match="base_as='int4' is unknown: choose one of dequantized, quantized, original"):
        load_base(tmp_path, None, "int4", None, None)
    assert describe_quantization(None) == "plain weights"
    assert describe_quantization(NF4) == "nf4 weights in bfloat16 with double quantisation"
