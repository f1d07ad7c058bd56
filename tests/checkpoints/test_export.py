import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DiffLlamaForCausalLM, PreTrainedTokenizerFast

from difftune.checkpoints import export as export_file
from difftune.checkpoints.export import export_model
from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerForCausalLM

MakeModel = Callable[..., DiffTransformerForCausalLM]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_diffllama_export_is_loaded_by_plain_transformers(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, ids = make_model(), torch.randint(61, (2, 30))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_model(model, tokenizer, "deep/er/export", format="diffllama", source="a test")
    assert report.path == tmp_path / "deep/er/export"
    assert report.reloaded_as == "DiffLlamaForCausalLM"
    assert report.max_abs_difference is not None and report.budget is not None
    assert 0 < report.max_abs_difference < 1e-5 < report.budget
    assert f"{report.max_abs_difference:.2e}" in str(report)
    again = AutoModelForCausalLM.from_pretrained(report.path)
    assert type(again) is DiffLlamaForCausalLM
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(report.path)("7 3")["input_ids"] == tokenizer("7 3")["input_ids"]
    assert again.generation_config.eos_token_id == 2
    card = (report.path / "README.md").read_text()
    for part in ("| source | a test |", "| format | diffllama |", f"{report.max_abs_difference:.2e}", "diff_v1"):
        assert part in card
    assert [path.name for path in report.path.parent.iterdir()] == ["export"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "diff_v2"},
        {"attention": "softmax"},
        {"subln": "none"},
        {"lambda_init": 0.8},
        {"qk_norm": True},
        {"tie_word_embeddings": True},
    ],
)
def test_difftune_export_keeps_every_variant_to_the_bit(make_model: MakeModel, tmp_path: Path, changes) -> None:
    model, ids = make_model(**changes), torch.randint(61, (2, 30))
    report = export_model(model, None, tmp_path / "export", format="difftune")
    assert report.max_abs_difference == 0
    again = load_model(report.path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert "import difftune.modeling" in (report.path / "README.md").read_text()


@pytest.mark.parametrize("format", ["difftune", "diffllama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_verified_and_keep_their_dtype(
    make_model: MakeModel, tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    make_model().save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source", dtype=dtype)
    report = export_model(model, None, tmp_path / "export", format=format)
    assert report.max_abs_difference is not None and report.max_abs_difference < 1e-5
    assert model.dtype == dtype
    again = load_model(report.path)
    assert again.dtype == dtype
    lambdas = [p.dtype for name, p in again.named_parameters() if "lambda_full" in name]
    assert set(lambdas) == {torch.float32}


def test_existing_folder_is_refused_or_replaced(make_model: MakeModel, tmp_path: Path) -> None:
    model, target = make_model(), tmp_path / "export"
    export_model(model, None, target)
    (target / "stale.txt").touch()
    with pytest.raises(ValueError, match="exists: choose another folder, or overwrite=True"):
        export_model(model, None, target)
    assert (target / "stale.txt").exists()
    export_model(model, None, target, overwrite=True)
    assert not (target / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_overwrite_replaces_model_folders_only(make_model: MakeModel, tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "precious.txt").touch()
    with pytest.raises(ValueError, match="is not a model folder"):
        export_model(make_model(), None, target, overwrite=True)
    assert (target / "precious.txt").exists()


def test_wrong_layout_is_an_error_and_leaves_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("difftune.checkpoints.diffllama.groups_to_halves", lambda rows, groups: rows)
    with pytest.raises(ValueError, match="reloaded as DiffLlamaForCausalLM differs from the model: logits by up to"):
        export_model(make_model(), None, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_failed_overwrite_leaves_the_old_folder(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = make_model(), tmp_path / "export"
    export_model(model, None, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("difftune.checkpoints.diffllama.save_torch_state_dict", no_space)
        with pytest.raises(OSError, match="No space left"):
            export_model(model, None, target, overwrite=True)
    rename = os.rename
    with monkeypatch.context() as patch:
        # The last rename fails: what stood there must come back.
        patch.setattr(
            Path, "rename", lambda a, b: no_space() if b == target and a.name == target.name else rename(a, b)
        )
        with pytest.raises(OSError, match="No space left"):
            export_model(model, None, target, overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_model_with_nan_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.norm\.weight hold nan or inf"):
        export_model(model, None, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_unverified_export_says_so(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_file, "_compare", None)
    report = export_model(make_model(), None, tmp_path / "export", verify=False)
    assert report.max_abs_difference is None
    assert "not verified" in str(report)
    assert "not verified" in (report.path / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_before_writing(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    target = tmp_path / "export"
    with pytest.raises(ValueError, match="unknown export format 'gguf': choose one of diffllama, difftune"):
        export_model(make_model(), None, target, format="gguf")
    with pytest.raises(ValueError, match="only a DiffTransformerForCausalLM can be exported, got Linear"):
        export_model(torch.nn.Linear(1, 1), None, target)
    with pytest.raises(ValueError, match="the tokenizer has 14 tokens, the model only 12"):
        export_model(make_model(vocab_size=12), tokenizer, target)
    with pytest.raises(ValueError, match="cannot be written as DiffLlama"):
        export_model(make_model(attention="diff_v2"), None, target)
    assert not list(tmp_path.iterdir())
