import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from difftune.evaluation.judges import (
    MAX_BODY_BYTES,
    Claim,
    EndpointJudge,
    JudgeSilentError,
    JudgeUnavailableError,
    parse_conclusion,
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


@contextmanager
def raw_server(*parts: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """An endpoint that answers every request with these bytes, whatever HTTP says of them; parts after pauses."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(2**16)
                try:
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(pause_s)
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
BROKEN = {
    "a body that ends early": [HEAD + b'Content-Length: 500\r\n\r\n{"choices"'],
    "no HTTP": [b"what do you want?\r\n\r\n"],
    "nothing": [b""],
    "too many headers": [HEAD + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n{}"],
    "too deep": [HEAD + b"\r\n" + b"[" * 200_000],
    "no JSON": [HEAD + b"\r\n<html>"],
    "not text": [HEAD + b"\r\n\xff\xfe\x00\xd8{"],
    "too long": [HEAD + b'\r\n{"choices": "' + b"x" * MAX_BODY_BYTES + b'"}'],
    "broken chunks": [HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"],
    "a code that is none": [b"HTTP/1.1 abc OK\r\n\r\n{}"],
    "an error that ends early": [b"HTTP/1.1 500 No\r\nContent-Length: 500\r\n\r\noh"],
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_what_is_no_answer_makes_the_judge_unavailable(parts):
    with raw_server(*parts) as url, pytest.raises(JudgeUnavailableError, match="in 2 attempts"):
        EndpointJudge(url, "m", retries=1, wait_s=0.01, timeout_s=5).judge(SUMMARY, never)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v 1", "no-address", "http://[::1/v1", "ftp://127.0.0.1:1/v1", "http://127.0.0.1:x/v1"]
)
def test_an_address_that_is_none_makes_the_judge_unavailable(url):
    with pytest.raises(JudgeUnavailableError, match="did not answer"):
        EndpointJudge(url, "m", retries=0).judge(SUMMARY, never)


def test_an_answer_that_drips_is_given_up_at_the_deadline():
    drops = [HEAD, *[b"X-%d: 1\r\n" % n for n in range(50)]]
    started = time.monotonic()
    with (
        raw_server(*drops, pause_s=0.1) as url,
        pytest.raises(JudgeUnavailableError, match=r"no whole answer in 0\.5 s"),
    ):
        EndpointJudge(url, "m", retries=0, timeout_s=0.5).judge(SUMMARY, never)
    assert time.monotonic() - started < 4


def test_a_caller_whose_time_is_over_does_not_wait_for_the_answer():
    begun = time.monotonic()
    with raw_server(HEAD, b"", b"", pause_s=2.0) as url, pytest.raises(JudgeUnavailableError, match="time was over"):
        EndpointJudge(url, "m", retries=0).judge(SUMMARY, lambda: time.monotonic() - begun > 0.3)
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_host(code, caplog):
    with judge_server() as other:
        redirect = b"HTTP/1.1 %d Go\r\nLocation: %s/x?key=sk-there\r\n\r\n" % (code, other.url.encode())
        with raw_server(redirect) as url, pytest.raises(ValueError, match="redirects are not followed") as raised:
            EndpointJudge(url, "m", "sk-SECRET", retries=0).judge(SUMMARY, never)
        assert other.requests == [] and other.keys == []
    assert "sk-" not in str(raised.value) + caplog.text


def said_by(body: bytes, key: str, caplog: pytest.LogCaptureFixture) -> str:
    """All that can be read of a judge that answers so, its errors and what led to them."""
    with raw_server(body) as url, caplog.at_level(logging.DEBUG):
        judge = EndpointJudge(f"{url}?code=pass-word", "m", key, retries=1, wait_s=0.01)
        try:
            told = str(judge.judge(SUMMARY, never))
        except Exception as error:
            told = f"{error!r} {error.__cause__!r}"
    return told + caplog.text + repr(judge)


@pytest.mark.parametrize(
    "body",
    [
        b"HTTP/1.1 401 No\r\n\r\nwrong key: sk-SECRET",
        b"HTTP/1.1 401 No\r\n\r\n" + b"x" * 295 + b"sk-SECRET",
        b"HTTP/1.1 503 No\r\n\r\nwrong key: sk-SECRET",
        HEAD + b"\r\n" + json.dumps({"error": "x" * 280 + " sk-SECRET"}).encode(),
        HEAD + b"\r\n" + json.dumps({"choices": [{"message": {"refusal": "not sk-SECRET"}}]}).encode(),
        HEAD + b"\r\n" + json.dumps({"choices": [{"message": {"content": "sk-SECRET **Conclusion: True**"}}]}).encode(),
    ],
)
def test_the_key_stands_in_no_message_log_answer_or_repr(body, caplog):
    told = said_by(body, "sk-SECRET", caplog)
    assert "sk-S" not in told and "pass-word" not in told


def test_a_key_with_a_line_end_is_cleaned_and_one_that_no_header_can_carry_is_refused():
    with judge_server() as server:
        EndpointJudge(server.url, "m", "sk-1\n").judge(SUMMARY, never)
        assert server.keys == ["Bearer sk-1"]
    for key in ("sk-1\nX: y", "sk-\u2026"):
        with pytest.raises(ValueError, match="characters that no HTTP header can carry") as raised:
            EndpointJudge("http://127.0.0.1:1", "m", key)
        assert "sk-" not in str(raised.value)
