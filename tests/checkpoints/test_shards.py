import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from difftune.checkpoints.shards import LazyTensors, require_usable, write_shards

STATE = {"a": torch.randn(4, 8), "b": torch.randn(8), "c": torch.randn(3, 8).bfloat16(), "d": torch.tensor(2.0)}


def assert_is_state(tensors: LazyTensors) -> None:
    assert set(tensors) == set(STATE) and len(tensors) == len(STATE)
    assert tensors.shapes() == {name: tensor.shape for name, tensor in STATE.items()}
    for name, tensor in STATE.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("max_shard_bytes", [1, 150, 10_000])
def test_what_is_written_is_read(tmp_path: Path, max_shard_bytes: int) -> None:
    write_shards(STATE.items(), tmp_path, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in tmp_path.iterdir())
    expected = {
        1: [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)] + ["model.safetensors.index.json"],
        150: ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        10_000: ["model.safetensors"],
    }
    assert files == expected[max_shard_bytes]
    assert_is_state(LazyTensors(tmp_path))


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors"])
def test_one_file_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(STATE, path) if name.endswith(".safetensors") else torch.save(STATE, path)
    assert_is_state(LazyTensors(path))


def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    write_shards(model.state_dict().items(), tmp_path, max_shard_bytes=4000)
    config.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    again = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_shard_is_written_before_the_next_tensor_is_asked_for_twice(tmp_path: Path) -> None:
    written = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(4):
            written.append(len(list(tmp_path.glob("*"))))
            yield str(i), torch.ones(100)

    write_shards(stream(), tmp_path, max_shard_bytes=400)
    assert written == [0, 0, 1, 2]


def test_views_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    write_shards([("left", whole[:, :3]), ("top", whole[:2]), ("turned", whole.T)], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["left"], whole[:, :3]) and torch.equal(stored["top"], whole[:2])
    assert torch.equal(stored["turned"], whole.T)
    assert (tmp_path / "model.safetensors").stat().st_size < 1000


def test_one_tensor_under_two_names_is_written_twice(tmp_path: Path) -> None:
    tensor = torch.randn(5)
    write_shards([("a", tensor), ("b", tensor)], tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], tensor)


def test_a_name_that_comes_twice_and_an_empty_stream_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a comes twice"):
        write_shards([("a", torch.ones(2)), ("a", torch.ones(2))], tmp_path)
    with pytest.raises(ValueError, match="no tensor to write"):
        write_shards([], tmp_path)


def test_damaged_and_incomplete_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        LazyTensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        LazyTensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_shards(STATE.items(), tmp_path, max_shard_bytes=150)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"e": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"1 missing \(e\)"):
        LazyTensors(tmp_path)
    index.write_text(json.dumps(listed))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors does not exist: .* download it again"):
        LazyTensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        LazyTensors(tmp_path)


class Payload:
    """What only unpickling of arbitrary classes could restore."""


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"weights\.pt is not a state dict written by torch\.save"):
        LazyTensors(path)
    torch.save({"x": Payload()}, path)
    with pytest.raises(ValueError, match=r"weights\.pt is not a state dict written by torch\.save"):
        LazyTensors(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match=r"holds a list: save model\.state_dict\(\) instead"):
        LazyTensors(path)
    torch.save({"model": STATE, "step": 3}, path)
    with pytest.raises(ValueError, match=r"holds more than tensors \(model, step\): save the dict of the weights"):
        LazyTensors(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_weights_pass_and_others_do_not(dtype: torch.dtype) -> None:
    tensor = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert require_usable("w", tensor, "here") is tensor
    assert require_usable("w", tensor[:0], "here").numel() == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = tensor.clone()
        broken[1, 2] = broken[2, 0] = bad
        with pytest.raises(ValueError, match="w in here has 2 of 12 values that are NaN or infinite: take a"):
            require_usable("w", broken, "here")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_do_not_pass(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"w in here is {dtype}: quantised weights are not read"):
        require_usable("w", torch.ones(3).to(dtype), "here")
