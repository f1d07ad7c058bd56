import pytest

from difftune.data.formats import FORMATS, Dropped, Example, normalise_trace, read_example, resolve_format
from difftune.data.sources import Source, read_rows
from tests.conftest import shared_data

THOUGHT = (
    "<|begin_of_thought|>\n\nThree plus four.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{7}.\n\n<|end_of_solution|>"
)
TRACE = "<think>\nThree plus four.\n</think>\n\nIt is \\boxed{7}."
OPENTHOUGHTS = {
    "source": "cn_k12",
    "problem": "Compute 3+4.",
    "solution": "REFERENCE \\boxed{7}",
    "messages": [
        {"role": "user", "content": "Compute 3+4."},
        {"role": "assistant", "content": "REFERENCE \\boxed{7}"},
    ],
    "system": "Use <|begin_of_thought|> ...",
    "conversations": [{"from": "user", "value": "Compute 3+4."}, {"from": "assistant", "value": THOUGHT}],
    "generated_token_count": 42,
    "correct": True,
}
GSM8K = {"question": "3 and 4?", "answer": "He has 3+4=<<3+4=7>>7 cats.\n#### 7"}
ROWS = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    "prompt_completion": {"prompt": "Hi", "completion": "Ho"},
    "text": {"text": "Once.", "meta": "{}"},
    "question_answer": {"question": "3+4?", "answer": "7", "dataset": "x", "id": "x-0"},
    "openthoughts": OPENTHOUGHTS,
    "openthoughts_metadata": {
        "problem": "Compute 3+4.",
        "deepseek_reasoning": "Three plus four.",
        "deepseek_solution": "It is \\boxed{7}.",
        "ground_truth_solution": "\\boxed{7}",
        "domain": "math",
        "test_cases": None,
    },
    "openmathinstruct2": {
        "problem": "Sum?",
        "generated_solution": "1+3=4, \\boxed{4}.",
        "expected_answer": "4",
        "problem_source": "math",
    },
    "metamathqa": {"type": "GSM_SV", "query": "5+2?", "original_question": "?", "response": "7.\nThe answer is: 7"},
    "numina": {
        "source": "olympiads",
        "problem": "Solve.",
        "solution": "\\boxed{3}",
        "messages": [{"role": "user", "content": "Solve."}, {"role": "assistant", "content": "\\boxed{3}"}],
    },
}


def read(name: str, columns: dict, **options) -> Example | Dropped:
    return read_example(FORMATS[name], columns, "rows.jsonl, line 3", **options)


def target(name: str, columns: dict, **options) -> str:
    example = read(name, columns, **options)
    assert isinstance(example, Example), example
    assert example.messages[-1]["role"] == "assistant"
    return example.messages[-1]["content"]


@pytest.mark.parametrize("name", ROWS)
def test_format_is_recognised_by_the_columns_of_the_public_set(name):
    assert resolve_format("auto", ROWS[name], "here") is FORMATS[name]


def test_every_format_but_gsm8k_is_recognised_by_its_columns():
    elsewhere = {"gsm8k", "math", "svamp", "asdiv", "calc_x", "tabmwp"}  # in test_math_sets.py
    elsewhere |= {"conversations", "alpaca", "openorca", "preferences", "generations"}  # in test_chat_formats.py
    assert set(FORMATS) - set(ROWS) == elsewhere


def test_openthoughts_114k_default_configuration_is_recognised():
    row = {name: OPENTHOUGHTS[name] for name in ("system", "conversations")}
    # Its columns are those of any ShareGPT set with a system column; its delimiters tell it.
    assert resolve_format("auto", row, "here") is FORMATS["conversations"]
    assert target("conversations", row) == TRACE


@pytest.mark.parametrize("columns", [{"input": "a", "output": "b"}, {"text": "a", "messages": []}, {"chosen": []}])
def test_unclear_columns_are_an_error_that_names_columns_and_formats(columns):
    with pytest.raises(ValueError) as error:
        resolve_format("auto", columns, "rows.jsonl, line 1")
    assert all(name in str(error.value) for name in [*columns, *FORMATS, "rows.jsonl, line 1"])


def test_unknown_format_is_an_error_that_names_the_formats():
    with pytest.raises(ValueError, match=r"unknown data format 'openthought'.*openthoughts"):
        resolve_format("openthought", {}, "here")


def test_openthoughts_learns_the_r1_trace_and_not_the_reference_solution():
    assert target("openthoughts", OPENTHOUGHTS) == TRACE
    assert "REFERENCE" not in str(read("openthoughts", OPENTHOUGHTS))


def test_openthoughts_leaves_out_the_system_prompt_for_the_other_delimiters():
    row = {**OPENTHOUGHTS, "conversations": [{"from": "system", "value": "s"}, *OPENTHOUGHTS["conversations"]]}
    example = read("openthoughts", row)
    assert [turn["role"] for turn in example.messages] == ["user", "assistant"]


def test_openthoughts_drops_rows_that_are_not_verified():
    for correct in (False, None):
        assert read("openthoughts", {**OPENTHOUGHTS, "correct": correct}) == Dropped("answer not verified as correct")


def test_openthoughts_reads_a_trace_in_messages_if_that_is_all_there_is():
    row = {"messages": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": TRACE}], "correct": True}
    assert target("openthoughts", row) == TRACE


def test_openthoughts_does_not_fall_back_to_a_solution_without_trace():
    row = {**OPENTHOUGHTS, "conversations": None}
    assert read("openthoughts", row) == Dropped("no complete reasoning trace")


@pytest.mark.parametrize(
    "text",
    [
        THOUGHT,
        TRACE,
        "<think>Three plus four.</think>It is \\boxed{7}.",
        "Three plus four.\n</think>\nIt is \\boxed{7}.",
        "\n" + THOUGHT + "\n",
    ],
)
def test_both_delimiter_families_become_one_form(text):
    assert normalise_trace(text) == TRACE


@pytest.mark.parametrize(
    "text",
    [
        "It is \\boxed{7}.",
        "<think>\nThree plus four",
        "<think>\nThree plus four\n</think>\n",
        "<think></think>7",
        THOUGHT.replace("<|end_of_solution|>", ""),
        THOUGHT.split("<|begin_of_solution|>")[0],
    ],
)
def test_incomplete_trace_is_none(text):
    assert normalise_trace(text) is None


def test_openthoughts_metadata_assembles_the_trace():
    assert target("openthoughts_metadata", ROWS["openthoughts_metadata"]) == TRACE
    row = {**ROWS["openthoughts_metadata"], "deepseek_reasoning": None}
    assert read("openthoughts_metadata", row) == Dropped("no complete reasoning trace")


def test_gsm8k_learns_the_working_without_calculator_marks_then_the_answer():
    for name in ("gsm8k", "question_answer"):
        assert target(name, GSM8K) == "He has 3+4=7 cats.\n#### 7"
        assert read(name, GSM8K).answer == "7"


def test_gsm8k_with_a_solution_column_reads_the_same():
    row = {"question": "3 and 4?", "answer": "7", "solution": "He has 3+4=<<3+4=7>>7 cats."}
    assert target("gsm8k", row) == target("gsm8k", GSM8K)
    assert read("gsm8k", row).answer == "7"


def test_gsm8k_without_working_is_an_error():
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: gsm8k needs the working"):
        read("gsm8k", {"question": "3+4?", "answer": "7"})


def test_question_answer_without_working_learns_the_answer_alone():
    assert target("question_answer", {"question": "3+4?", "answer": "7"}) == "7"
    assert target("question_answer", {"problem": "3+4?", "answer": 7}) == "7"


def test_question_answer_keeps_a_boxed_solution_as_it_is():
    row = {"problem": "3+4?", "answer": "7", "solution": "It is $\\boxed{7}$."}
    assert target("question_answer", row) == "It is $\\boxed{7}$."


def test_answers_of_the_instruction_sets_are_known():
    assert read("metamathqa", ROWS["metamathqa"]).answer == "7"
    assert read("openmathinstruct2", ROWS["openmathinstruct2"]).answer == "4"


def test_answer_only_replaces_the_target_by_the_answer():
    assert target("gsm8k", GSM8K, answer_only=True) == "7"
    assert read("gsm8k", GSM8K, answer_only=True).messages[0]["content"] == "3 and 4?"


@pytest.mark.parametrize("name", ["messages", "text", "numina"])
def test_answer_only_without_a_known_answer_is_an_error(name):
    with pytest.raises(ValueError, match="line 3: answer_only needs the final answer"):
        read(name, ROWS[name], answer_only=True)


def test_prompt_and_completion_become_two_turns():
    example = read("prompt_completion", ROWS["prompt_completion"])
    assert example.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_text_has_no_turns():
    example = read("text", ROWS["text"])
    assert (example.text, example.messages) == ("Once.", [])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("text", {"text": " "}, "empty text"),
        ("prompt_completion", {"completion": ""}, "empty target"),
        ("prompt_completion", {"prompt": None}, "empty prompt"),
        ("question_answer", {"answer": ""}, "empty answer"),
        ("metamathqa", {"response": None}, "empty target"),
        ("messages", {"messages": [{"role": "assistant", "content": " "}]}, "empty assistant turn"),
    ],
)
def test_empty_text_is_dropped_with_the_reason(name, change, reason):
    assert read(name, {**ROWS[name], **change}) == Dropped(reason)


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("metamathqa", {"query": "a"}, "line 3: no column 'response'; there are query"),
        ("text", {"text": ["a"]}, "line 3: column 'text' must be text, got list"),
        ("messages", {"messages": "hello"}, "line 3: column 'messages' must be a list"),
        ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "needs role.*got.*robot"),
        ("messages", {"messages": [{"role": "user"}]}, "needs role.*content"),
        ("openthoughts", {"correct": True}, "no column 'messages'"),
    ],
)
def test_wrong_columns_are_an_error_that_names_the_row(name, columns, message):
    with pytest.raises(ValueError, match=message):
        read(name, columns)


@pytest.mark.parametrize(
    "name", ["asdiv", "carp", "college_math", "gsm8k", "math", "mawps", "svamp", "tabmwp", "../gsm8k_train"]
)
def test_real_maths_sets_are_read_without_a_drop(name):
    path = shared_data() / "math_eval" / f"{name}.jsonl"
    row_format = None
    for row in read_rows(Source(str(path))):
        row_format = row_format or resolve_format("auto", row.columns, row.where)
        example = read_example(row_format, row.columns, row.where)
        assert isinstance(example, Example)
        assert example.answer == row.columns["answer"].strip()
        assert example.answer in example.messages[-1]["content"] or "\\boxed" in example.messages[-1]["content"]
        assert "<<" not in example.messages[-1]["content"]
