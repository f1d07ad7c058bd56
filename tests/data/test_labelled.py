import json
from collections import Counter
from pathlib import Path

import pytest

from difftune.data.labelled import SETS, LabelledText, load_labelled, readable_question_type
from tests.conftest import shared_data


def test_rows_become_texts_and_labels_in_words(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": " where is it? ", "label": "card_arrival"}) + "\n")
    assert load_labelled(file) == [LabelledText("where is it?", "card arrival")]
    with pytest.raises(ValueError, match=r"line 1: columns 'text' and 'kind' must hold text; there are label, text"):
        load_labelled(file, label_column="kind")
    file.write_text("")
    with pytest.raises(ValueError, match="has no example"):
        load_labelled(file)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("HUM:gr", "human group"),
        ("ENTY:cremat", "entity creation"),
        ("DESC", "description"),
        ("LOC:other", "location other"),
    ],
)
def test_question_types_are_named_as_in_the_reference(code: str, words: str) -> None:
    assert readable_question_type(code) == words


@pytest.mark.parametrize(("name", "classes"), [("trec", 6), ("trec_fine", 50), ("banking77", 77), ("clinic150", 150)])
def test_the_real_sets_have_the_classes_of_the_paper(name: str, classes: int) -> None:
    folder, known = shared_data() / "icl", SETS[name]
    train, test = (
        load_labelled(folder / file, label_column=known.label_column, readable=known.readable)
        for file in (known.train, known.test)
    )
    counts = Counter(example.label for example in train)
    assert len(counts) == classes and {example.label for example in test} <= set(counts)
    assert not [label for label in counts if "_" in label or ":" in label]
