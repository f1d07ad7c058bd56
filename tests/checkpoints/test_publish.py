import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from difftune.checkpoints.export import export_model
from difftune.checkpoints.publish import check_target, model_card, new_folder, usage
from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM


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
        if to == target and path.parent.name == "new":
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
    assert "import difftune" not in plain and "trust_remote_code" not in plain and "tokenizer alone" not in plain


CARD_READER = """
import sys
sys.modules["difftune"] = None  # importing it is an error
from transformers import PreTrainedTokenizerFast
card, folder = sys.argv[1:]
exec(card)
alone = PreTrainedTokenizerFast.from_pretrained(folder)
assert alone("7+5")["input_ids"] == tokenizer("7+5")["input_ids"]
print(type(model).__name__)
"""


def test_what_the_card_shows_loads_model_and_tokenizer_without_a_question_or_a_warning(tmp_path: Path) -> None:
    config = DiffTransformerConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    tokenizer = build_tokenizer("digits")
    export_model(DiffTransformerForCausalLM(config), tokenizer, tmp_path / "mine", "difftune")
    card = re.search(r"```python\n(.*?)```", (tmp_path / "mine" / "README.md").read_text(), flags=re.DOTALL)
    assert card is not None
    done = subprocess.run(
        [sys.executable, "-c", CARD_READER, card[1], "mine"],
        cwd=tmp_path,
        # A question at a terminal would be answered with yes, and seen in the output.
        input="y\n" * 9,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "DiffTransformerForCausalLM"
    assert "custom code" not in done.stderr and "model of type" not in done.stderr, done.stderr


def left_by_a_dead_process(parent: Path, name: str, *, with_old: bool = False) -> Path:
    work = parent / f".{name}.x1y2.partial"
    (work / "new" / name).mkdir(parents=True)
    (work / "lock").touch()
    if with_old:
        (work / "old").mkdir()
        (work / "old" / "config.json").write_text("old")
    return work


def test_what_a_dead_process_left_is_removed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work, other = left_by_a_dead_process(tmp_path, "out"), left_by_a_dead_process(tmp_path, "out.2")
    with caplog.at_level(logging.WARNING), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").touch()
    assert not work.exists() and other.exists(), "that of another place is left alone"
    assert caplog.messages == [f"removed {work}, which a process that died had left unfinished"]


def test_a_folder_that_a_dead_process_had_taken_away_comes_back(tmp_path: Path) -> None:
    work, target = left_by_a_dead_process(tmp_path, "out", with_old=True), tmp_path / "out"
    with pytest.raises(ValueError, match="exists: choose another folder"), new_folder(target):
        pass
    assert (target / "config.json").read_text() == "old" and not work.exists()


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as first:
        with pytest.raises(KeyError), new_folder(tmp_path / "out") as second:
            assert first.is_dir() and second.is_dir()
            raise KeyError
        (first / "config.json").write_text("first")
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_termination_while_the_folder_is_replaced_keeps_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    target, rename, calls = tmp_path / "new", os.rename, []
    target.mkdir()
    (target / "config.json").write_text("old")

    def interrupted(path: Path, to: Path) -> None:
        calls.append(path)
        if (at, len(calls)) == ("before", 1):
            os.kill(os.getpid(), signal.SIGTERM)
        rename(path, to)
        if (at, len(calls)) in (("between", 1), ("after", 2)):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit) as raised, new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert raised.value.code == 143
    assert (target / "config.json").read_text() == ("new" if at == "after" else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_termination_that_was_lost_on_its_way_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(SystemExit), new_folder(tmp_path, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_handler_that_is_there_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with new_folder(tmp_path / "out") as folder:
            os.kill(os.getpid(), signal.SIGTERM)
            (folder / "config.json").touch()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and (tmp_path / "out").is_dir()


def test_the_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "model") as folder:
            (folder / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/disk/base", "base"),
        ("~/models/base/", "base"),
        ("/a/lora, merged into /b/base (llama)", "lora, merged into base (llama)"),
        ("org/model", "org/model"),
        ("https://host/org/model", "https://host/org/model"),
        ("checkpoints/main/step-00000005 of a difftune run", "checkpoints/main/step-00000005 of a difftune run"),
    ],
)
def test_a_card_has_no_private_paths(text, shown):
    card = model_card("m", about=f"Made of {text}", usage="", rows={"source": text})
    assert f"Made of {shown} by" in card and f"| source | {shown} |" in card
