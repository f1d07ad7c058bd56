import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from difftune.data.chat import encode_examples
from difftune.data.formats import Example
from difftune.data.problems import load_problems
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.grading import Grader
from difftune.evaluation.math import PAPER, MathTask, Sample, evaluate_math, summarise
from tests.evaluation.scripted import Problem, ScriptedModel, tiny_model

# "@" is the end of text: problem 2 has no answer, problem 4 rambles on.
ANSWERS = {"1+1": "#### 2@", "2+2": "#### 5@", "3+3": "hmm@", "4+4": "#### 8 and so on and on and on", "5+5": "10@"}
GOLDS = {"1+1": "2", "2+2": "4", "3+3": "6", "4+4": "8", "5+5": "10"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer("digits")


@pytest.fixture
def problems() -> list[Problem]:
    return [Problem(f"p{n}", question, gold) for n, (question, gold) in enumerate(GOLDS.items())]


def test_the_figures_are_those_of_a_hand_made_case(tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> None:
    model = ScriptedModel(tokenizer, ANSWERS)
    result = evaluate_math(model, tokenizer, problems, max_new_tokens=12, batch_size=2)
    assert [s.verdict for s in result.samples] == ["correct", "wrong", "unparsed", "wrong", "correct"]
    assert [s.id for s in result.samples] == ["p0", "p1", "p2", "p3", "p4"]
    assert [s.num_tokens for s in result.samples] == [7, 7, 4, 12, 3]
    assert [s.finished for s in result.samples] == [True, True, True, False, True]
    assert result.samples[3] == Sample(3, "p3", "4+4", "8", "#### 8 and s", "8 and s", "wrong", 12, False)
    assert (result.accuracy, result.n, result.skipped, result.complete) == (0.4, 5, 0, True)
    assert result.truncated == pytest.approx(0.2) and result.unparsed == pytest.approx(0.2)
    assert result.mean_length == pytest.approx(33 / 5)
    assert result.interval == pytest.approx((0.11762, 0.76928), abs=1e-4)
    assert result.verdicts == {"correct": 2, "wrong": 2, "unparsed": 1, "timeout": 0, "killed": 0}
    assert result.metrics()["accuracy_low"] == result.interval[0]
    assert json.loads(json.dumps(result.to_dict()))["interval"] == list(result.interval)


def test_the_papers_accuracies_stand_beside_those_of_its_sets(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    rows = {name: MathTask(name, problems, max_new_tokens=12).summarise([]).row() for name in ("svamp", "sums")}
    assert rows["svamp"]["paper: DIFF, Transformer 3B"] == "0.637, 0.550"
    assert not any("paper" in column for column in rows["sums"])
    # Their means are the paper's own.
    means = [sum(known.values()) / 8 for known in PAPER.values()]
    assert means == pytest.approx([0.508, 0.433], abs=6e-4)


def test_several_answers_a_problem_are_averaged_by_problem(tokenizer: PreTrainedTokenizerBase) -> None:
    model = ScriptedModel(tokenizer, {"1+1": ["2@", "2@", "3@", "2@"], "2+2": ["4@", "1@", "1@", "1@"]})
    problems = [Problem("a", "1+1", "2"), Problem("b", "2+2", "4")]
    result = evaluate_math(model, tokenizer, problems, max_new_tokens=8, temperature=1.0, num_samples=4)
    assert result.accuracy == pytest.approx((0.75 + 0.25) / 2)
    assert (result.n, len(result.samples)) == (2, 8), "the interval is that of two problems, not of eight"
    assert result.interval == pytest.approx((0.09453, 0.90547), abs=1e-4)


def test_a_real_model_runs_end_to_end(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = load_problems("synthetic:arithmetic", limit=12)
    model = tiny_model()
    first = evaluate_math(model, tokenizer, problems, max_new_tokens=10, batch_size=5)
    assert first.n == 12 and first.mean_length > 1
    # Greedy: neither the batches nor the parts change what comes out.
    task = MathTask("arithmetic", problems, max_new_tokens=10, batch_size=12)
    parts = [task.run(model, tokenizer, part=(rank, 3)) for rank in range(3)]
    task.close()
    assert [len(part) for part in parts] == [4, 4, 4]
    assert task.summarise(sample for part in parts for sample in part) == first


def test_parts_and_seeds_draw_different_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    grader = Grader()
    problems = [Problem(str(n), "1+1", "2") for n in range(2)]
    model = tiny_model(initializer_range=0.1)

    def texts(seed: int, part: tuple[int, int]) -> list[str]:
        task = MathTask("t", problems, max_new_tokens=10, temperature=1.0, seed=seed, grader=grader)
        return [sample.text for sample in task.run(model, tokenizer, part=part)]

    assert texts(0, (0, 2)) == texts(0, (0, 2))
    assert len({*texts(0, (0, 2)), *texts(0, (1, 2)), *texts(1, (0, 2)), *texts(1, (1, 2))}) == 4
    grader.close()


def test_what_the_time_did_not_allow_is_skipped_and_not_counted_as_wrong(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    # One poll before the block, one before each batch of it.
    polls = iter([False, False, False, True])
    model = ScriptedModel(tokenizer, ANSWERS)
    result = evaluate_math(
        model, tokenizer, problems, max_new_tokens=12, batch_size=1, should_stop=lambda: next(polls, True)
    )
    assert (result.n, result.skipped, result.complete) == (2, 3, False)
    assert sum(result.verdicts.values()) == len(result.samples) == 2
    assert result.accuracy == sum(s.verdict == "correct" for s in result.samples) / 2


def test_an_evaluation_without_time_says_that_it_knows_nothing(
    tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> None:
    result = evaluate_math(tiny_model(), tokenizer, problems, max_new_tokens=9, deadline=time.monotonic() - 1)
    assert math.isnan(result.accuracy) and result.interval == (0.0, 1.0) and result.n == 0 and result.skipped == 5
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["accuracy"] is None


def test_the_prompt_is_what_training_puts_before_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+7"}]
    seen: list[list[int]] = []

    class Spy(ScriptedModel):
        def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
            seen.extend(input_ids.tolist())
            return super().generate(input_ids, **settings)

    rendered = tokenizer.decode(tokenizer("Be brief.12+7")["input_ids"])
    evaluate_math(
        Spy(tokenizer, {rendered: "19@"}), tokenizer, [Problem("a", "12+7", "19", messages)], max_new_tokens=5
    )
    chat = [*messages, {"role": "assistant", "content": "19"}]
    (trained,) = encode_examples(tokenizer, [Example(messages=chat)], ["row"])
    first_label = int(trained.learned.argmax())
    assert seen == [trained.ids[:first_label].tolist()]


def test_the_models_state_is_untouched(tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> None:
    model = tiny_model(use_cache=False).train()
    state = torch.get_rng_state()
    evaluate_math(model, tokenizer, problems, max_new_tokens=6, temperature=1.0)
    assert model.training and model.config.use_cache is False and torch.equal(torch.get_rng_state(), state)


def no_template() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer("digits")
    tokenizer.chat_template = None
    return tokenizer


def failures() -> Iterator[Any]:
    one = [Problem("a", "1+1", "2")]
    yield [], {}, build_tokenizer("digits"), "has no problem"
    yield one, {"num_samples": 0}, build_tokenizer("digits"), "num_samples of task 'problems' must be at least 1"
    yield one, {"num_samples": 2}, build_tokenizer("digits"), "needs temperature > 0"
    yield one, {}, no_template(), "no chat template"
    yield [Problem("b7", "π", "1")], {}, build_tokenizer("digits"), "problem b7: the tokenizer cannot encode"
    yield [Problem("c", "1", " ")], {}, build_tokenizer("digits"), "gold answer .* is blank"


@pytest.mark.parametrize(("problems", "settings", "tokenizer", "message"), list(failures()))
def test_what_cannot_be_evaluated_is_refused(
    problems: list[Problem], settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_math(tiny_model(), tokenizer, problems, max_new_tokens=4, **settings)


def test_no_samples_make_no_figures() -> None:
    result = summarise([], 0)
    assert math.isnan(result.accuracy) and result.n == 0 and result.complete


def test_rows_that_are_no_problems_are_shown_with_the_figures(problems: list[Problem]) -> None:
    task = MathTask("sums", problems, max_new_tokens=12, dropped={"empty answer": 2, "empty question": 1})
    result = task.summarise([])
    assert str(result).endswith("3 rows of the file are no problems (2 empty answer, 1 empty question)")
    assert result.to_dict()["dropped"] == {"empty answer": 2, "empty question": 1}
    assert "no problems" not in str(MathTask("sums", problems, max_new_tokens=12).summarise([]))
