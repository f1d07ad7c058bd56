import pytest

from difftune.data.examples import Dropped, question_and_target, row_id, text_of


@pytest.mark.parametrize(("value", "text"), [(None, ""), (42, "42"), (42.5, "42.5"), ("a", "a")])
def test_a_column_is_read_as_text(value, text):
    assert text_of({"answer": value}, "answer") == text


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}, float("inf")])
def test_what_is_no_text_is_refused_by_its_column(value):
    with pytest.raises(ValueError, match="column 'answer' must be text"):
        text_of({"answer": value}, "answer")


def test_a_question_and_a_target_are_two_turns_and_an_empty_one_is_no_example():
    columns = {"question": " 1+1? ", "id": 7}
    example = question_and_target(columns, "question", " 2 ", "2")
    assert [turn["content"] for turn in example.messages] == ["1+1?", "2"] and (example.id, example.answer) == (
        "7",
        "2",
    )
    assert question_and_target({"question": " "}, "question", "2") == Dropped("empty question")
    assert question_and_target(columns, "question", " ").is_bad
    assert row_id({"uuid": "u"}) == "u" and row_id({}) is None
