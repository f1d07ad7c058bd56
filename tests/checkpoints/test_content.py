import json
import shutil

from difftune.checkpoints.content import model_content


def model(folder, weights=b"abc", **config):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    return folder


def test_a_model_that_was_moved_or_saved_by_another_library_is_the_same(tmp_path):
    first = model_content(model(tmp_path / "a", _name_or_path="x", transformers_version="1"))
    assert first.keys() == {"weights", "architecture"}
    assert model_content(model(tmp_path / "b", _name_or_path="y", transformers_version="2")) == first


def test_each_part_of_a_model_shows_when_it_changes(tmp_path):
    first = model_content(model(tmp_path / "a"))
    other = model_content(model(tmp_path / "b", weights=b"abd"))
    assert other["architecture"] == first["architecture"] and other["weights"] != first["weights"]
    assert model_content(model(tmp_path / "c", rope_theta=5))["architecture"] != first["architecture"]
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    before = model_content(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [1]}')
    assert model_content(tmp_path / "a")["generation"] != before["generation"]
    (tmp_path / "b" / "shards").mkdir()
    (tmp_path / "b" / "shards" / "rank-0.bin").write_bytes(b"1")
    assert model_content(tmp_path / "b")["weights"] != other["weights"]


def test_an_adapter_is_of_its_base_wherever_that_lies(tmp_path):
    base = model(tmp_path / "base")
    adapter = model(tmp_path / "adapter", weights=b"lora")
    (adapter / "config.json").unlink()
    config = {"base_model_name_or_path": str(base), "r": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    first = model_content(adapter)
    shutil.move(base, tmp_path / "moved")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "moved")})
    )
    assert model_content(adapter) == first
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"abd")
    changed = model_content(adapter)
    assert changed["base"] != first["base"] and changed["weights"] == first["weights"]
