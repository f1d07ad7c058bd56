import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from difftune.checkpoints import llama
from difftune.checkpoints.llama import config_from_llama, config_to_llama, read_gguf, read_llama, write_llama
from difftune.checkpoints.streams import in_order
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from tests.checkpoints.llamas import each_kind, logits, make_llama, token_ids


@each_kind
def test_the_softmax_kind_is_the_model_itself(tmp_path: Path, model_type: str, changes) -> None:
    source = make_llama(model_type, **changes)
    source.save_pretrained(tmp_path)
    foreign, tensors = read_llama(tmp_path)
    config = config_from_llama(foreign)
    ours = DiffTransformerForCausalLM.from_pretrained(None, config=config, state_dict=dict(in_order(tensors)))
    ids = token_ids(2, 30)
    torch.testing.assert_close(logits(ours, ids), logits(source, ids), rtol=0, atol=1e-5)


@each_kind
def test_writing_gives_the_same_files_for_transformers(tmp_path: Path, model_type: str, changes) -> None:
    source = make_llama(model_type, **changes)
    source.save_pretrained(tmp_path / "source")
    foreign, tensors = read_llama(tmp_path / "source")
    options = {"dtype": torch.float32, "max_shard_bytes": 10**9}
    write_llama(config_from_llama(foreign), in_order(tensors), tmp_path / "out", **options)
    again, _ = read_llama(tmp_path / "out")
    # A Mistral without window is a Llama.
    assert again.model_type == ("llama" if model_type == "mistral" else model_type)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(), r"sliding_window=4096: attention here sees the whole context.*max_position_embeddings"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1, num_hidden_layers=2), "sliding_window=4096"),
        (Qwen3Config(layer_types=["sliding_attention"], num_hidden_layers=1), "sliding_window"),
        (LlamaConfig(mlp_bias=True), "mlp_bias=True: the gated unit here has no bias"),
        (LlamaConfig(attention_dropout=0.1), r"attention_dropout=0\.1: attention here has none; set it to 0"),
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            r"partial_rotary_factor=0\.5: heads here are rotated whole",
        ),
    ],
    ids=["mistral", "qwen2", "qwen3", "mlp_bias", "dropout", "partial_rotary"],
)
def test_what_ours_does_not_express_is_refused_by_name(config, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)uses what a DIFF Transformer here does not have.*{message}"):
        config_from_llama(config)


def test_a_window_that_never_closes_is_no_window() -> None:
    assert config_from_llama(MistralConfig(sliding_window=4096, max_position_embeddings=4096)).attention == "softmax"


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma3"}, r"model_type 'gemma3'; of the Llama family are read: llama \(Llama.*qwen3"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification, not a language model.*LlamaForCausalLM",
        ),
        ({"quantization_config": {"quant_method": "gguf"}}, r"is quantised \(gguf\): packed weights are not converted"),
        ({"num_hidden_layers": 2}, r"9 extra \(model\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"9 missing \(model\.layers\.3\."),
        ({"intermediate_size": 81}, "do not have their shape"),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    make_llama().save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        read_llama(tmp_path)


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # as old versions stored it
    save_file(tensors, path)
    _, found = read_llama(tmp_path)
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & set(found)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight that differs from the embedding"):
        read_llama(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "diff_v2"}, "attention='diff_v2': a Llama has softmax attention"),
        ({"attention_out_bias": True}, "no model of the Llama family has these together"),
        ({"attention_bias": True, "qk_norm": True}, "no model of the Llama family has these together"),
        ({"attention_bias": True, "head_dim": 6}, "head_dim=6: Qwen2"),
    ],
)
def test_combinations_that_no_member_has_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_llama(DiffTransformerConfig(**{"attention": "softmax", **fields}))


class _Model:
    """What transformers might give for a GGUF file."""

    def __init__(self, config: LlamaConfig, tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors = config, tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)


def test_gguf_files_are_read_dequantised_and_refused_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = make_llama(tie_word_embeddings=True), {}

    class Auto:
        @staticmethod
        def from_pretrained(**options: Any) -> Any:
            asked.update(options)
            return _Model(source.config, tensors) if "dtype" in options else source.config

    monkeypatch.setattr(llama.transformers.utils, "is_gguf_available", lambda: True)
    monkeypatch.setattr(llama, "AutoConfig", Auto)
    monkeypatch.setattr(llama, "AutoModelForCausalLM", Auto)
    tensors = source.state_dict()
    config, found = read_gguf(tmp_path / "m.gguf")
    assert config is source.config and set(found) == set(tensors) - {"lm_head.weight"}
    assert asked["gguf_file"] == "m.gguf" and asked["dtype"] == torch.float32
    assert asked["quantization_config"].dequantize

    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"m\.gguf stays packed .*\(1 tensors\): packed weights are not converted"):
        read_gguf(tmp_path / "m.gguf")
    source.config.model_type = "phi3"
    with pytest.raises(ValueError, match="model_type 'phi3'; of the Llama family are read"):
        read_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(llama.transformers.utils, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        read_gguf(tmp_path / "m.gguf")
