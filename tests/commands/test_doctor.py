"""What the doctor finds, and by which exit code it says whether a recipe could start."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from difftune.commands import doctor
from difftune.commands.doctor import (
    Finding,
    find_backends,
    find_devices,
    find_disk,
    find_hub,
    find_versions,
    flash_wheel,
)
from difftune.commands.doctor_ranks import Reached
from difftune.config import load_config

SMALL = {
    "tokenizer": "digits",
    "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "data": {"train": [{"path": "synthetic:arithmetic", "options": {"count": 10}}]},
    "trainer": {"accelerator": "cpu", "max_steps": 1},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "run_dir": str(tmp_path / "run")}))
    return path


def of_kind(found: list[Finding], kind: str) -> list[str]:
    return [f"{finding.what}: {finding.text}" for finding in found if finding.kind == kind]


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "reach_ranks", lambda **_: [Reached("gloo", True, "reached")])


@pytest.mark.usefixtures("no_ranks")
def test_a_recipe_that_could_start_gives_0_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.diagnose(str(recipe)) == 0
    said = capsys.readouterr().out
    assert f"nothing keeps fit --config {recipe} from starting" in said.replace("\n", "")
    assert "HF_HUB_OFFLINE is set" in said and "fault" not in said
    assert sorted(os.listdir(tmp_path)) == ["small.yaml"]


@pytest.mark.usefixtures("no_ranks")
def test_a_recipe_that_could_not_start_gives_1_with_every_reason(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.train=[{path: gone.jsonl}]", "model.attention_backend=flash", "tokenizer=someone/tokenizer"]
    overrides.append("model.vocab_size=102")
    assert doctor.diagnose(str(recipe), overrides) == 1
    said = capsys.readouterr().out.replace("\n", "")
    for reason in (
        "gone.jsonl is not there",
        "backend flash",
        "someone/tokenizer is no folder here",
        "could not start",
    ):
        assert reason in said


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("name", ["/gone", "./gone/model", "~/gone"])
def test_folders_that_are_gone_are_faults_and_not_repositories(
    recipe: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.diagnose(str(recipe), [f"model.path={name}", f"tokenizer={name}"]) == 1
    name = os.path.expanduser(name)
    said = capsys.readouterr().out.replace("\n", "")
    assert f"{name} does not exist" in said and f"{name} is no folder here" not in said
    # Where the model is not the one that is missing, the file check says so.
    assert doctor.diagnose(str(recipe), [f"tokenizer={name}", "model.vocab_size=102"]) == 1
    assert f"{name} is not there" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_and_a_padded_batch_are_tried_in_the_recipes_precision(
    recipe: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.diagnose(str(recipe), [f"trainer.precision={precision}"]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert f"trial in {precision}: one step and one padded generated batch" in said
    assert "4 tokens for each of two prompts" in said


@pytest.mark.usefixtures("no_ranks", "padding_fails_in_half")
def test_a_padded_batch_that_fails_in_the_recipes_precision_is_a_fault(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.diagnose(str(recipe)) == 0
    assert doctor.diagnose(str(recipe), ["trainer.precision=bf16-mixed"]) == 1
    said = capsys.readouterr().out.replace("\n", "")
    assert "a padded batch of two generated texts in bf16-mixed fails: value cannot be converted" in said


@pytest.mark.usefixtures("no_ranks")
def test_a_recipe_that_is_wrong_is_a_fault_beside_what_is_found_of_the_machine(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.diagnose(str(recipe), ["optim.lrr=1"]) == 1
    said = capsys.readouterr().out
    assert "optim.lrr" in said and "versions" in said and "disk" in said


def test_more_devices_than_there_are_is_a_fault() -> None:
    config = load_config(None, ["tokenizer=digits", "trainer.accelerator=gpu", "trainer.devices=64"], command="plan")
    (fault,) = of_kind(find_devices(config), "fault")
    assert "wants 64 cuda devices" in fault


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TESTED", {"torch": "2.13.0", "no-such-package-of-ours": "1.0"})
    assert of_kind(find_versions(), "fault") == [
        "packages: not installed: no-such-package-of-ours; pip install difftune"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it may run")
def test_a_backend_is_a_fault_only_where_the_recipe_names_it() -> None:
    asked = load_config(None, ["tokenizer=digits", "model.attention_backend=flash"], command="plan")
    assert any("flash-attn" in text for text in of_kind(find_backends(asked), "fault"))
    assert of_kind(find_backends(None), "fault") == []


def test_a_model_that_is_not_there_is_a_fault() -> None:
    config = load_config(None, ["model.path=not/here/at/all"], command="plan")
    (fault,) = of_kind(find_backends(config), "fault")
    assert "not/here/at/all" in fault


def test_a_run_folder_that_cannot_be_written_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    config = load_config(None, ["tokenizer=digits", f"run_dir={tmp_path}"], command="plan")
    assert "read-only" in of_kind(find_disk(config), "fault")[0]


def test_a_disk_without_room_for_the_checkpoints_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["tokenizer=digits", f"run_dir={tmp_path}", "model.num_hidden_layers=1", "checkpoint.keep_last=3"]
    config = load_config(None, keys, command="plan")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20, "total": 2**30}))
    assert "5 checkpoints take up to" in of_kind(find_disk(config), "fault")[0]


def test_no_hub_is_a_statement_and_not_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", unreachable)
    (found,) = find_hub(None)
    assert found.kind == "note" and "no route" in found.text


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        # As the releases of flash-attention name them.
        (
            ("2.8.0+cu128", "12.8", True, (3, 12), "x86_64"),
            "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl",
        ),
        (
            ("2.13.0", "13.0", True, (3, 11), "aarch64"),
            "flash_attn-2.8.3+cu13torch2.13cxx11abiTRUE-cp311-cp311-linux_aarch64.whl",
        ),
        (("2.13.0+cpu", None, True, (3, 11), "x86_64"), None),
    ],
)
def test_the_wheel_is_named_as_the_releases_are(arguments: tuple, name: str | None) -> None:
    assert flash_wheel(*arguments) == name


def test_versions_newer_than_the_tested_ones_are_a_note_with_the_command_that_goes_back(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "untested_versions", lambda: {"transformers": ("6.0.0", "5.23.0")})
    noted = of_kind(find_versions(), "note")
    assert noted == [
        "versions: newer than what was tested: transformers 6.0.0 (tested up to 5.23.0); "
        "if something fails: pip install transformers==5.23.0"
    ]
    monkeypatch.setattr(doctor, "untested_versions", dict)
    assert not of_kind(find_versions(), "note")
