"""The config of an adapter on disk, and the base that it names."""

import json
from pathlib import Path
from typing import Any

import pytest

from difftune.checkpoints.adapter_config import adapter_base, base_of_adapter, read_adapter_config, tokenizer_folder


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q1_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    folder = write(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    assert base_of_adapter(folder) == adapter_base(folder) == tokenizer_folder(str(folder)) == str(tmp_path / "base")
    assert base_of_adapter(tmp_path / "base") is None and read_adapter_config(folder).r == 2


def test_an_adapter_that_leads_back_to_itself_is_refused_by_whoever_asks_for_its_base(tmp_path: Path) -> None:
    own, first, second = (tmp_path / name for name in ("own", "first", "second"))
    write(own, base_model_name_or_path=str(own))
    write(first, base_model_name_or_path=str(second))
    write(second, base_model_name_or_path=str(first))
    (tmp_path / "link").symlink_to(own)
    for folder in (own, first, second, tmp_path / "link"):
        for ask in (adapter_base, lambda path: tokenizer_folder(str(path))):
            with pytest.raises(ValueError, match=r"leads back to itself as its base .*--base DIR"):
                ask(folder)


@pytest.mark.parametrize("base", [None, "", 3, ["a"]])
def test_an_adapter_without_a_base_says_so(tmp_path: Path, base: object) -> None:
    with pytest.raises(ValueError, match=r"name it \(--base DIR\)"):
        adapter_base(write(tmp_path / "a", base_model_name_or_path=base))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": "two"}, "r must be a finite number above 0, got 'two'"),
        ({"r": 0}, "got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number above 0, got nan"),
        ({"lora_alpha": True}, "got True"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_adapter_config(write(tmp_path / "a", **changes))
