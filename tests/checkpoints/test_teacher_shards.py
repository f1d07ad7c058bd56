import json

import pytest
import torch
from safetensors.torch import save_file

from difftune.checkpoints.load import load_teacher
from difftune.checkpoints.teacher_shards import load_sharded_teacher
from tests.training.teaching import build_llama, build_student


def filled(folder, dtype=None):
    model, fill = load_sharded_teacher(str(folder), dtype)
    assert fill is not None
    assert all(parameter.is_meta for parameter in model.parameters())
    fill(model, device="cpu")
    return model


def assert_same(folder, dtype=None):
    """Parameters, buffers that are not stored either, and what is said of a text are those of the whole load."""
    whole, shards = load_teacher(str(folder), dtype), filled(folder, dtype)
    for kind in ("named_parameters", "named_buffers"):
        theirs, mine = dict(getattr(whole, kind)()), dict(getattr(shards, kind)())
        assert theirs.keys() == mine.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
    assert not shards.training
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, shards(input_ids=ids).logits)
    return shards


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_a_llama_is_that_of_the_whole_load(tmp_path):
    build_llama(rope_parameters=LLAMA3).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same(tmp_path)
    assert_same(tmp_path, torch.bfloat16)


def test_a_tied_head_is_tied_again(tmp_path):
    build_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    model = assert_same(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16


def test_the_dtype_of_a_config_without_one_is_that_of_the_weights(tmp_path):
    build_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert assert_same(tmp_path).dtype == torch.bfloat16


def test_our_own_is_that_of_the_whole_load(tmp_path):
    build_student(attention="diff_v2").save_pretrained(tmp_path)
    assert_same(tmp_path)
    assert_same(tmp_path, torch.bfloat16)


def save_pickled(folder):
    model = build_llama()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_with_frequencies(folder):
    """As conversions of old did."""
    model = build_llama()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_gemma(folder):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 40}
    Gemma3ForCausalLM(Gemma3TextConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    "save, reason",
    [(save_pickled, "neither"), (save_with_frequencies, "1 extra"), (save_gemma, "buffers that its config alone")],
)
def test_what_cannot_be_read_in_parts_is_loaded_whole_and_said(tmp_path, our_log, save, reason):
    save(tmp_path)
    model, fill = load_sharded_teacher(str(tmp_path))
    assert fill is None
    assert not any(parameter.is_meta for parameter in model.parameters())
    (message,) = our_log.messages
    assert "every process loads the whole teacher" in message and reason in message


def test_weights_that_are_missing_are_an_error(tmp_path):
    model = build_llama()
    model.model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a LlamaForCausalLM, such as lm_head.weight"):
        load_sharded_teacher(str(tmp_path))


def test_what_no_load_can_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="could not be loaded"):
        load_sharded_teacher(str(tmp_path))
