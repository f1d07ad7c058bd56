import pytest

from difftune.evaluation.judges import Claim
from difftune.evaluation.span_support import SpanSupportJudge, words
from tests.evaluation.test_judges import STORY


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Dandolo led the fleet to Zadar.", "true"),
        ("Napoleon conquered Moscow in winter.", "false"),
        ("The fleet sailed in 1205.", "false"),  # a number that is not there
        ("", "false"),
        ("the of and", "false"),  # says nothing
    ],
)
def test_span_support_counts_words_of_the_document(text, verdict):
    assert SpanSupportJudge().judge(Claim(STORY, None, ["x"], text)).verdict == verdict


def test_span_support_wants_a_valid_answer_to_a_question():
    def verdict(text):
        return SpanSupportJudge().judge(Claim(STORY, "Who led the fleet?", ["Enrico Dandolo", "Dandolo"], text)).verdict

    assert verdict("Enrico Dandolo led it") == "true" and verdict("the old doge") == "false"
    assert "no judge" in SpanSupportJudge().name and words("It's 1,000.") == ["it's", "1000"]
