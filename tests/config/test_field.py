import dataclasses

from difftune.config import Config
from difftune.config.field import all_keys, describe_kind, describe_range, key


@dataclasses.dataclass
class Section:
    number: int = key(3, low=1)
    items: list[int] = key([1, 2], length=2)


def test_a_field_has_its_default_and_its_constraints() -> None:
    assert Section().number == 3 and Section().items == [1, 2]
    assert {f.name: dict(f.metadata) for f in dataclasses.fields(Section)} == {
        "number": {"low": 1},
        "items": {"length": 2},
    }


def test_a_default_list_is_not_shared() -> None:
    Section().items.append(3)
    assert Section().items == [1, 2]


def test_kinds_and_ranges_are_put_in_words() -> None:
    assert describe_kind(int | str | None) == "an integer, text or null"
    assert describe_kind(list[int]) == "a list"
    assert describe_range({}) == ""
    assert describe_range({"above": 0, "high": 1}) == "greater than 0 and at most 1"
    assert describe_range({"low": 0, "high": 1}) == "between 0 and 1"


def test_all_keys_are_dotted_and_stop_at_lists() -> None:
    keys = all_keys(Config)
    assert {"seed", "trainer", "trainer.max_steps", "export.format", "stages"} <= set(keys)
    assert not any(key.startswith(("stages.", "data.train.")) for key in keys)
