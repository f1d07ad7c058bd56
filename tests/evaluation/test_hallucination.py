import logging
import threading

import pytest
from rich.console import Console

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.hallucination import PAPER, HallucinationTask, SourceText
from difftune.evaluation.judges import EndpointJudge, Judgement
from difftune.evaluation.quantization import quantized_attention
from difftune.evaluation.span_support import SpanSupportJudge
from tests.evaluation.judge_server import judge_server
from tests.evaluation.scripted import tiny_model

TOKENIZER = build_tokenizer("digits")
SOURCES = [SourceText(str(n), f"Story {n} of Troy.", None if n % 2 else "Who?", ["Troy"]) for n in range(5)]


def task(judge, **options):
    return HallucinationTask("stories", SOURCES, judge, max_new_tokens=6, batch_size=2, **options)


def test_texts_are_judged_and_counted():
    with judge_server(answer="**Conclusion: False**") as server:
        server.script = ["**Conclusion: True**", "who knows"]
        made = task(EndpointJudge(server.url, "m"))
        result = made.summarise(made.run(tiny_model(), TOKENIZER))
    metrics = result.metrics()
    assert metrics["accuracy"] == pytest.approx(1 / 5) and metrics["unparsed"] == pytest.approx(1 / 5)
    assert result.complete and metrics["n"] == 5 and "0.200 of 5 texts" in str(result)
    assert result.row()["judge"] == result.to_dict()["judge"] == "m"
    console = Console(width=140, record=True)
    console.print(*result.tables())
    shown = console.export_text()
    assert f"{PAPER['diff_v1']['multi_news']:.2f}" in shown and f"{PAPER['softmax']['qasper']:.2f}" in shown
    assert {sample.verdict for sample in result.samples} == {"true", "false", "unparsed"}


def test_a_dead_endpoint_loses_nothing(tmp_path, caplog, monkeypatch):
    model = tiny_model()
    kept = []
    with judge_server() as server:
        server.script = ["**Conclusion: True**", 500, 500]
        judge = EndpointJudge(server.url, "m", cache=tmp_path / "j.jsonl", retries=1, wait_s=0.01)
        made = task(judge, cache=tmp_path / "t.jsonl")
        with caplog.at_level(logging.WARNING):
            samples = made.run(model, TOKENIZER, on_block=kept.extend)
        assert len(samples) == len(kept) == 1 and "no judgement, so the task stops here" in caplog.text
        assert not made.summarise(samples).complete and len(server.requests) == 3
        # The text that could not be judged is there, and is not written again.
        from difftune.evaluation import hallucination

        written = []
        original = hallucination.generate_texts

        def counted(model, tokenizer, prompts, **options):
            written.extend(prompts)
            return original(model, tokenizer, prompts, **options)

        monkeypatch.setattr(hallucination, "generate_texts", counted)
        samples = made.run(model, TOKENIZER, done=samples)
        assert made.summarise(samples).complete and len(written) == 3 and len(server.requests) == 7
    assert sorted(sample.index for sample in samples) == [0, 1, 2, 3, 4]


def test_a_judge_that_says_nothing_of_a_text_leaves_it_for_the_next_run(tmp_path, caplog):
    silent = {"choices": [{"message": {"content": None, "refusal": "No."}}]}
    with judge_server() as server:
        server.script = [silent, "**Conclusion: True**", silent]
        made = task(EndpointJudge(server.url, "m", cache=tmp_path / "j.jsonl"), cache=tmp_path / "t.jsonl")
        with caplog.at_level(logging.WARNING):
            samples = made.run(tiny_model(), TOKENIZER)
        result = made.summarise(samples)
        assert len(samples) == 3 and not result.complete and result.metrics()["unparsed"] == 0
        (warned,) = (record.getMessage() for record in caplog.records)
        assert warned.startswith("stories: the judge gave no answer to text ")
        assert "(refused: No.): such texts do not count, the next run asks again" in warned
        caplog.clear()
        server.script = [silent]
        with caplog.at_level(logging.WARNING):
            samples = made.run(tiny_model(), TOKENIZER, done=samples)
        assert len(samples) == 4 and len(server.requests) == 7 and len(caplog.records) == 1
        samples = made.run(tiny_model(), TOKENIZER, done=samples)
        assert made.summarise(samples).complete and len(server.requests) == 8


def test_the_offline_judge_needs_no_network_and_says_its_name():
    made = task(SpanSupportJudge())
    result = made.summarise(made.run(tiny_model(), TOKENIZER))
    assert result.complete and "offline, no judge" in str(result) and result.metrics()["accuracy"] == 0


def test_a_set_without_documents_is_refused():
    with pytest.raises(ValueError, match="no document"):
        HallucinationTask("stories", [], SpanSupportJudge())


def test_texts_of_rounded_attention_are_not_taken_for_those_of_the_model_itself(tmp_path):
    with judge_server() as server:
        made = task(EndpointJudge(server.url, "m"), cache=tmp_path / "t.jsonl")
        model = tiny_model()
        plain = {sample.index: sample.text for sample in made.run(model, TOKENIZER)}
        with quantized_attention(model, bits=2):
            rounded = {sample.index: sample.text for sample in made.run(model, TOKENIZER)}
            anew = {sample.index: sample.text for sample in task(SpanSupportJudge()).run(model, TOKENIZER)}
        again = {sample.index: sample.text for sample in made.run(model, TOKENIZER)}
    assert rounded == anew != plain == again


def test_a_text_whose_line_was_cut_by_a_crash_costs_no_other(tmp_path):
    with judge_server() as server:
        made = task(EndpointJudge(server.url, "m"), cache=tmp_path / "t.jsonl")
        texts = [sample.text for sample in made.run(tiny_model(), TOKENIZER)]
        lines = (tmp_path / "t.jsonl").read_text().splitlines(True)
        (tmp_path / "t.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
        for _ in range(2):
            assert [sample.text for sample in made.run(tiny_model(), TOKENIZER)] == texts
    assert sorted((tmp_path / "t.jsonl").read_text().splitlines(True)) == sorted(lines)


class TogetherJudge:
    """Answers when three questions wait at once, so that asking one by one would never end well."""

    name, at_once = "together", 3

    def __init__(self):
        self.barrier = threading.Barrier(3, timeout=20)

    def judge(self, claim, is_over):
        self.barrier.wait()
        return Judgement("true" if "Story 1" in claim.document else "false", claim.document)


def test_the_texts_of_a_batch_are_judged_at_once_and_each_gets_its_own_judgement():
    sources = [SourceText(str(n), f"Story {n} of Troy.", None, ["Troy"]) for n in range(6)]
    made = HallucinationTask("stories", sources, TogetherJudge(), max_new_tokens=3, batch_size=3)
    samples = made.run(tiny_model(), TOKENIZER)
    assert [sample.reason for sample in sorted(samples, key=lambda one: one.index)] == [s.document for s in sources]
    assert [sample.index for sample in samples if sample.verdict == "true"] == [1]


def test_a_judge_that_cannot_be_reached_is_the_failure_of_the_task():
    with judge_server() as server:
        url = server.url
    made = task(EndpointJudge(url, "m", retries=0))
    assert made.failure is None
    assert made.run(tiny_model(), TOKENIZER) == [] and "did not answer in 1 attempts" in made.failure
