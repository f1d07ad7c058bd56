from collections import Counter

import pytest

from difftune.data.labelled import LabelledText
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.demonstrations import Template, arrange, select

EXAMPLES = [LabelledText(f"text {n}", "abc"[n % 3]) for n in range(30)] + [LabelledText("more", "a")]
TOKENIZER = build_tokenizer("digits")
TEMPLATE = Template(TOKENIZER, "Question:", "Type:")


def labels(examples: list[LabelledText]) -> str:
    return "".join(example.label for example in examples)


def test_one_shot_a_class_is_one_of_each_and_more_include_fewer() -> None:
    assert sorted(labels(select(EXAMPLES, 3, 0))) == ["a", "b", "c"]
    assert sorted(Counter(labels(select(EXAMPLES, 10, 0))).values()) == [3, 3, 4]
    assert {label for seed in range(20) for label in labels(select(EXAMPLES, 1, seed))} == {"a", "b", "c"}
    assert select(EXAMPLES, 10, 0)[:3] == select(EXAMPLES, 3, 0)
    assert len(select(EXAMPLES, 31, 0)) == 31 and select(EXAMPLES, 6, 0) != select(EXAMPLES, 6, 1)
    with pytest.raises(ValueError, match="32 demonstrations cannot be drawn: there are 31"):
        select(EXAMPLES, 32, 0)


@pytest.mark.parametrize("order", ["random", "alternating"])
def test_an_order_changes_places_and_nothing_else(order: str) -> None:
    chosen = select(EXAMPLES, 9, 0)
    orders = [arrange(chosen, order, seed) for seed in range(5)]
    assert all(sorted(e.text for e in one) == sorted(e.text for e in chosen) for one in orders)
    assert len({tuple(e.text for e in one) for one in orders}) == 5
    assert arrange(chosen, order, 0) == orders[0]


def test_alternating_has_one_of_each_class_in_turn() -> None:
    for seed in range(5):
        found = labels(arrange(select(EXAMPLES, 9, 0), "alternating", seed))
        assert found == 3 * found[:3] and sorted(found[:3]) == ["a", "b", "c"]


def test_the_parts_of_a_prompt_make_the_text_of_the_reference() -> None:
    shown = [LabelledText("Where?", "location"), LabelledText("Who?", "human group")]
    ids = [*TEMPLATE.demonstrations(shown), *TEMPLATE.query("When?"), *TEMPLATE.answer("numeric")]
    assert TOKENIZER.decode(ids) == (
        "Question: Where?\nType: location\n==\nQuestion: Who?\nType: human group\n==\nQuestion: When?\nType: numeric\n"
    )


def test_a_tokenizer_that_joins_prefix_and_label_is_refused() -> None:
    class Joining:
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    with pytest.raises(ValueError, match="joins 'Type:' and the label 'a' to one token: set another label_prefix"):
        Template(Joining(), "Question:", "Type:").label("a")
