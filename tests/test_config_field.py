import dataclasses

from difftune.config_field import key


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
