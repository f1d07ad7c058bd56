import pytest

from difftune.evaluation.judges import (
    Claim,
    EndpointJudge,
    JudgeSilentError,
    JudgeUnavailableError,
    SpanSupportJudge,
    parse_conclusion,
    words,
)
from tests.evaluation.judge_server import judge_server

STORY = "In 1204 the fleet sailed to Zadar. Enrico Dandolo, the old doge, led it, and the city fell after five days."
SUMMARY = Claim(STORY, None, ["The fleet took Zadar."], "Dandolo led the fleet.")


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Reasons. **Conclusion: True**", "true"),
        ("**Conclusion: False**\n**Problematic Spans: ['x']**", "false"),
        ("Not **Conclusion: True** but **Conclusion: False**", "false"),
        ("**Conclusion: Perhaps**", "unparsed"),
        ("True", "unparsed"),
        ("Conclusion: true", "true"),
    ],
)
def test_the_verdict_is_read_from_the_conclusion(answer, verdict):
    assert parse_conclusion(answer) == verdict


def test_the_judge_is_asked_with_document_reference_and_proposal():
    with judge_server() as server:
        judged = EndpointJudge(server.url, "m", api_key="secret").judge(SUMMARY, never)
        question = Claim(STORY, "Who led?", ["Dandolo", "the doge"], "Dandolo")
        EndpointJudge(server.url + "/", "m").judge(question, never)
    assert judged.verdict == "true"
    first, second = (request["messages"][1]["content"] for request in server.requests)
    assert server.requests[0]["model"] == "m" and server.keys == ["Bearer secret", None]
    assert (
        STORY in first and "#Ground Truth Summary#: The fleet took" in first and "#Proposed Summary#: Dandolo" in first
    )
    assert '(a list of valid answers)#: ["Dandolo", "the doge"]' in second and "#Question#: Who led?" in second
    assert "**Conclusion: True**" in first and "Problematic Spans" in second


def test_an_answer_is_kept_on_disk_and_not_asked_for_twice(tmp_path):
    cache = tmp_path / "sub" / "judgements.jsonl"
    with judge_server() as server:
        for _ in range(2):
            assert EndpointJudge(server.url, "m", cache=cache).judge(SUMMARY, never).verdict == "true"
        with cache.open("a") as file:
            file.write('{"key": "cut o')
        again = EndpointJudge(server.url, "m", cache=cache)
        assert again.judge(SUMMARY, never).verdict == "true" and len(server.requests) == 1
        EndpointJudge(server.url, "other", cache=cache).judge(SUMMARY, never)
        assert len(server.requests) == 2 and cache.read_text().count("\n") == 2


def test_an_endpoint_that_stumbles_is_asked_again():
    with judge_server() as server:
        server.script = [503, 429, "**Conclusion: False**"]
        judge = EndpointJudge(server.url, "m", wait_s=0.01)
        assert judge.judge(SUMMARY, never).verdict == "false" and len(server.requests) == 3


def test_a_dead_endpoint_is_given_up_after_the_attempts():
    with judge_server() as server:
        url = server.url
    with pytest.raises(JudgeUnavailableError, match="in 3 attempts"):
        EndpointJudge(url, "m", retries=2, wait_s=0.01, timeout_s=1).judge(SUMMARY, never)
    with pytest.raises(JudgeUnavailableError, match="time was over"):
        EndpointJudge(url, "m").judge(SUMMARY, lambda: True)


def test_a_refusal_is_told_at_once():
    with judge_server() as server:
        server.script = [401]
        with pytest.raises(ValueError, match=r"refuses the request \(HTTP 401.*check url, judge_model and the key"):
            EndpointJudge(server.url, "m", wait_s=0.01).judge(SUMMARY, never)
        assert len(server.requests) == 1


def choice(**message):
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (choice(content=None), "no text"),
        (choice(content="  "), "no text"),
        (choice(), "no text"),
        (choice(content=None, refusal="I will not judge this."), "refused: I will not judge this."),
        ({"choices": [{"message": None, "finish_reason": "content_filter"}]}, "no text.*content_filter"),
        ({"choices": []}, "no choices"),
        ({"choices": None}, "no choices"),
        ({"error": {"message": "upstream is away"}}, "no choices.*upstream is away"),
        (["what"], "no choices"),
        ({"choices": ["what"]}, "no text"),
        ({"choices": {"message": "what"}}, "no choices"),
    ],
)
def test_an_answer_without_a_text_is_none_and_is_asked_for_again(body, reason, tmp_path):
    cache = tmp_path / "judgements.jsonl"
    with judge_server() as server:
        server.script = [body]
        with pytest.raises(JudgeSilentError, match=reason):
            EndpointJudge(server.url, "m", cache=cache, wait_s=0.01).judge(SUMMARY, never)
        assert len(server.requests) == 1, "the same question has the same answer today"
        assert not cache.exists()
        again = EndpointJudge(server.url, "m", cache=cache).judge(SUMMARY, never)
        assert again.verdict == "true" and cache.read_text().count("\n") == 1


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
