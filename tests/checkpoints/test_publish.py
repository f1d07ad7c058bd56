import os
from pathlib import Path

import pytest

from difftune.checkpoints.publish import check_target, model_card, new_folder, usage


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        assert not target.exists() and folder.name == "out"
        (folder / "config.json").write_text("{}")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, error) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("old")
    for target in (old, tmp_path / "new"):
        with pytest.raises(error), new_folder(target, overwrite=True) as folder:
            (folder / "config.json").write_text("half")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (old / "config.json").read_text() == "old"


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "out", os.rename
    target.mkdir()
    (target / "config.json").write_text("old")

    def failing(path: Path, to: Path) -> None:
        if to == target and path.parent.name.endswith(".partial") and path.name == "out":
            raise OSError(28, "No space left on device")
        rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"), new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"


def test_only_model_folders_are_replaced_and_only_when_asked(tmp_path: Path) -> None:
    check_target(tmp_path / "absent")
    with pytest.raises(ValueError, match="exists: choose another folder, or overwrite"):
        check_target(tmp_path)
    with pytest.raises(ValueError, match=r"not a model folder \(no config.json or adapter_config.json\)"):
        check_target(tmp_path, overwrite=True)
    (tmp_path / "config.json").touch()
    check_target(tmp_path, overwrite=True)


def test_the_card_tells_how_to_load_and_every_row() -> None:
    card = model_card(
        "mine",
        about="A model, made",
        usage=usage("mine", brings_code=True),
        rows={"source": "there"},
        details="more",
    )
    assert card.startswith("---\n") and "# mine\n" in card and "A model, made by difftune" in card
    assert 'AutoModelForCausalLM.from_pretrained("mine", trust_remote_code=True)' in card
    assert "`import difftune.modeling` takes the place" in card
    assert "| source | there |\n| written with | torch" in card and card.endswith("\nmore\n")
    plain = usage("mine", brings_code=False)
    assert "import difftune" not in plain and "trust_remote_code" not in plain
