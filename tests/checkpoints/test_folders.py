import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from difftune.checkpoints.folders import (
    check_names,
    read_config,
    read_generation_config,
    read_json,
    read_tensors,
    resolve_folder,
)
from difftune.checkpoints.load import load_model
from difftune.checkpoints.shards import LazyTensors
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM


def test_folder_is_returned_and_other_things_are_refused(tmp_path: Path) -> None:
    assert resolve_folder(tmp_path) == tmp_path
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: give the folder"):
        resolve_folder(file)
    with pytest.raises(ValueError, match="does not exist: give a folder, or a hub id"):
        resolve_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="does not exist"):
        resolve_folder("just-a-name")


def test_unreachable_hub_id_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="runs/absent is neither a folder here nor a hub repository"):
        resolve_folder("runs/absent")


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n"a": 1,\n}')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: .*line 3"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_json(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_json(tmp_path / "other.json")


def test_shards_are_put_together(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert {name: tuple(t.shape) for name, t in read_tensors(tmp_path).items()} == {"a": (2,), "b": (3,)}

    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"1 missing \(c\); 1 extra \(b\)"):
        read_tensors(tmp_path)
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ValueError, match=r"one\.safetensors does not exist: the checkpoint is incomplete"):
        read_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_tensors(tmp_path)


def test_missing_and_truncated_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        read_tensors(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        read_tensors(tmp_path)


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(ValueError, match=r"20 missing \(t00, .*, t07 and 12 more\)$"):
        check_names([], [f"t{i:02}" for i in range(20)], source="x", expected_by="y")


def test_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="an empty name is no checkpoint"):
        resolve_folder("")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "x"}, "(?s)config.json: .*'hidden_size'.*expected int"),
        ({"num_attention_heads": 7}, r"config\.json: .*num_attention_heads"),
    ],
)
def test_wrong_config_fields_are_named_with_their_file(tmp_path: Path, fields, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path, DiffTransformerConfig)


def test_generation_config_may_be_absent_but_not_broken(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    path = tmp_path / "generation_config.json"
    path.write_text('{"max_new_tokens": 7}')
    config = read_generation_config(tmp_path)
    assert config is not None and config.max_new_tokens == 7
    path.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        read_generation_config(tmp_path)
    path.write_text('{"max_new_tokens": -7}')
    with pytest.raises(ValueError, match=r"generation_config\.json: .*max_new_tokens"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b", "", "..", 3, None, ["x"], "a\0"])
def test_an_index_names_files_beside_it_and_no_others(tmp_path: Path, file: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "good.safetensors", "b": file}}))
    with pytest.raises(ValueError, match=r"index\.json says that b is in .*beside it"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match="beside it"):
        LazyTensors(tmp_path)


@pytest.mark.parametrize("dtype", ["float99", 32, ["float32"], "nn", "torch.nope", {}])
def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path, dtype: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "difftune", "dtype": dtype}))
    with pytest.raises(ValueError, match=r"config\.json: dtype must be a type of torch"):
        read_config(tmp_path, DiffTransformerConfig)


@pytest.mark.parametrize("value", ["x", [1, "x"], 1.5, True, {}])
def test_a_generation_config_ends_at_numbers(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: .*eos_token_id|generation_config\.json: "):
        read_generation_config(tmp_path)


def test_deep_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_at_loading(tmp_path: Path, value: float) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DiffTransformerForCausalLM(DiffTransformerConfig(vocab_size=8, **sizes))
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.vocab_size == 8
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"up_proj\.weight hold nan or inf"):
        load_model(tmp_path)
