"""`difftune prepare`: data once, checks, a stored teacher, and training from it without the teacher."""

import json

import pytest

from difftune import cli
from difftune.commands import run
from difftune.commands.dry_run import StepCost
from difftune.config import load_config
from tests.data.test_doctor import TEST_PROBLEM, as_messages, make_row
from tests.training.teaching import TOKENIZER, VOCABULARY, build_llama

MODEL = (
    "tokenizer=digits",
    "model.attention=diff_v1",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=4",
    "model.max_position_embeddings=128",
)
TRAIN = (
    "data.train=[{path: 'synthetic:arithmetic', options: {count: 120}}]",
    "data.seq_len=64",
    "data.micro_batch_size=2",
    "trainer.accelerator=cpu",
    "trainer.max_steps=20",
    "trainer.log_every_n_steps=1",
    "optim.lr=3e-3",
    "logging.loggers=[jsonl]",
    "logging.progress_bar=false",
)


def prepare(*overrides, teacher=False, check=False, workers=1):
    run.prepare(load_config(None, overrides, command="prepare"), workers=workers, teacher=teacher, check=check)


def losses(run_dir, name="train/loss"):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["value"] for line in lines if line["name"] == name]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    build_llama().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_a_stored_teacher_of_all_tokens_trains_as_the_teacher_itself(teacher, tmp_path):
    """Offline at k = V and online: 20 steps in float32 to 1e-5."""
    common = (*MODEL, *TRAIN, f"distill.teacher={teacher}", "distill.temperature=2.0", "distill.weight=0.7")
    stored = (*common, f"distill.top_k={VOCABULARY}", "distill.stored_dtype=float32", f"run_dir={tmp_path / 'offline'}")
    prepare(*stored, teacher=True)
    assert run.fit(load_config(None, [*common, f"run_dir={tmp_path / 'online'}"])) == 0
    moved = teacher.rename(teacher.with_name("away"))
    try:
        assert run.fit(load_config(None, stored)) == 0, "training needs no teacher"
    finally:
        moved.rename(teacher)
    for name in ("train/loss", "train/divergence", "train/cross_entropy"):
        online, offline = (losses(tmp_path / folder, name) for folder in ("online", "offline"))
        assert len(online) == 20 and online[-1] < online[0]
        assert offline == pytest.approx(online, abs=1e-5)


def test_training_from_a_teacher_that_was_not_stored_names_the_command(teacher, tmp_path):
    config = load_config(None, [*MODEL, *TRAIN, f"distill.teacher={teacher}", "distill.top_k=4", f"run_dir={tmp_path}"])
    with pytest.raises(ValueError, match=r"nothing is stored of the teacher .* run `difftune prepare --teacher`"):
        run.fit(config)


def test_a_teacher_with_another_tokenizer_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"has another tokenizer than the student: .* of 262 tokens have another id"):
        run.fit(
            load_config(None, [*MODEL, *TRAIN, "tokenizer=bytes", f"distill.teacher={teacher}", f"run_dir={tmp_path}"])
        )


def test_a_teacher_to_store_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"no stage stores a teacher; set distill\.teacher and distill\.top_k"):
        prepare(*MODEL, *TRAIN, f"run_dir={tmp_path}", teacher=True)


def test_a_check_reports_forecasts_and_draws(tmp_path, capsys, write_jsonl):
    rows = [make_row(n) for n in range(1, 60)]
    tests = write_jsonl([{"question": TEST_PROBLEM, "answer": "180"}], "tests.jsonl")
    overrides = (*MODEL, *TRAIN, "tokenizer=bytes", f"data.train=[{{path: {write_jsonl(rows)}}}]")
    prepare(
        *overrides,
        "data.seq_len=180",
        "model.max_position_embeddings=256",
        "data.overlong=truncate",
        f"evaluation.tasks=[{{path: {tests}, name: gsm8k}}]",
        f"run_dir={tmp_path / 'run'}",
        check=True,
        workers=2,
    )
    shown = capsys.readouterr().out
    check = json.loads((tmp_path / "run" / "data_check.json").read_text())["stages"][0]
    assert check["forecast"]["steps"] == 20 and check["forecast"]["tokens_per_s"] > 0
    assert check["forecast"]["peak_memory_gib"] > 0 and check["sources"][0]["rows"] == 59
    assert {finding["kind"] for finding in check["token_findings"]} == {"no_eos"}
    for words in ("59 rows, 59 learned", "tokens of a document", "do not end in the end-of-text token", "tokens/s"):
        assert words in shown, shown
    assert sum(check["histogram"]["counts"]) == 59


def test_wrong_data_are_refused_by_the_check_and_before_a_run(tmp_path, write_jsonl):
    path = write_jsonl([make_row(n) for n in range(1, 60)])
    wrong = (
        *MODEL,
        *TRAIN,
        "tokenizer=bytes",
        f"data.train=[{{path: {path}, format: numina}}]",
        f"run_dir={tmp_path}/run",
    )
    with pytest.raises(ValueError, match=r"are not fit to learn from:\n.*this learns the reference solution"):
        prepare(*wrong, check=True)
    assert not (tmp_path / "run" / "cache").exists(), "nothing is tokenised in vain"
    with pytest.raises(ValueError, match="are not fit to learn from"):
        run.fit(load_config(None, wrong))
    cut = write_jsonl([as_messages(n, f"<think>\n{n}") for n in range(60)], "cut.jsonl")
    with pytest.raises(ValueError, match="never end, or end without a solution"):
        run.fit(load_config(None, [*wrong, f"data.train=[{{path: {cut}}}]"]))
    assert run.fit(load_config(None, [*wrong, "data.check=false", "data.seq_len=128", "trainer.max_steps=1"])) == 0


REWORDED = "Please solve: " + TEST_PROBLEM.replace(" How many miles", " And so, how many miles")
"""Not the question itself, but a long run of its words."""


def contaminated(write_jsonl):
    """Rows one of which asks what a test set asks, in a few other words; and the test set."""
    row = make_row(7)
    row["conversations"][0]["value"] = REWORDED
    rows = write_jsonl([*(make_row(n) for n in range(1, 60)), row])
    test = {"question": TEST_PROBLEM, "answer": "180"}
    other = [{"question": f"What is {n} plus the square of {n}, minus one?", "answer": "1"} for n in range(3)]
    return rows, test, other


def test_a_run_warns_of_a_problem_that_its_data_have_in_other_words(tmp_path, write_jsonl, our_log):
    rows, test, other = contaminated(write_jsonl)
    tests = write_jsonl([test, *other], "tests.jsonl")
    overrides = (
        *MODEL,
        *TRAIN,
        "tokenizer=bytes",
        f"data.train=[{{path: {rows}}}]",
        "data.seq_len=512",
        "model.max_position_embeddings=512",
        "trainer.max_steps=1",
        "evaluation.before=false",
        f"run_dir={tmp_path / 'run'}",
    )
    # The stage that trains on the row measures nothing; the next one does, whatever the limit lets it see.
    measured = f"{{name: second, evaluation: {{max_new_tokens: 1, tasks: [{{path: {tests}, limit: 1}}]}}}}"
    assert run.fit(load_config(None, [*overrides, f"stages=[{{name: first}}, {measured}]"])) == 0
    warned = [
        record.getMessage() for record in our_log.records if "hold a problem of the test set" in record.getMessage()
    ]
    assert len(warned) == 2, "of each stage"
    assert "of its first 60 rows: 1 rows hold a problem of the test set tests" in warned[0]


def test_a_check_compares_with_all_eight_sets_and_says_which_it_could_not(tmp_path, capsys, write_jsonl, monkeypatch):
    monkeypatch.setattr("difftune.commands.prepare._cost", lambda *unused: None)
    rows, test, other = contaminated(write_jsonl)
    write_jsonl(other, "gsm8k.jsonl")
    write_jsonl([test, {"question": "1 + 1 = ?", "answer": "2"}], "asdiv.jsonl")
    recipe = (*MODEL, *TRAIN, "tokenizer=bytes", f"data.train=[{{path: {rows}}}]", f"run_dir={tmp_path / 'run'}")
    recipe += ("data.seq_len=512", "model.max_position_embeddings=512")
    # One file is named, the other lies beside it.
    tasks = f"[{{path: {tmp_path / 'gsm8k.jsonl'}, limit: 1}}, {{kind: needle, lengths: [64]}}]"
    prepare(*recipe, f"evaluation.tasks={tasks}", check=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "looked for in the rows: gsm8k (3 problems), asdiv (2 problems, 1 too short)" in shown
    assert "1 rows hold a problem of the test set asdiv" in shown
    assert "warning not looked for: carp: no data set of the hub is known for carp: set folder" in shown
    assert "warning not looked for: tabmwp: no file tabmwp.jsonl where the recipe has its sets, and no network" in shown
    assert "not looked for: needle: problems of the kind needle are not compared" in shown
    check = json.loads((tmp_path / "run" / "data_check.json").read_text())
    sets = check["test_sets"]
    assert sets["looked_for"] == {"gsm8k": 3, "asdiv": 2} and sets["too_short"] == {"asdiv": 1}
    assert set(sets["unread"]) == {"math", "svamp", "mawps", "carp", "tabmwp", "college_math"}
    assert set(sets["left_out"]) == {"needle"} and check["stages"][0]["sources"][0]["contaminated"] == {"asdiv": 1}


def test_devices_that_share_rows_take_one_row_in_the_forecast(tmp_path, monkeypatch):
    monkeypatch.setattr("difftune.commands.prepare._cost", lambda *unused: None)
    steps = {}
    for shared in (1, 2):
        folder = tmp_path / str(shared)
        devices = ("trainer.devices=4", f"trainer.context_parallel_size={shared}", f"run_dir={folder}")
        ends = ("trainer.max_steps=-1", "trainer.max_epochs=1", "data.check=false")
        prepare(*MODEL, *TRAIN, *devices, *ends, check=True)
        steps[shared] = json.loads((folder / "data_check.json").read_text())["stages"][0]["forecast"]
    assert steps[1]["tokens_a_step"] == 2 * steps[2]["tokens_a_step"]
    assert steps[1]["steps"] == -(-steps[2]["steps"] // 2)


@pytest.mark.parametrize(("devices", "count"), [("3", 3), ("[0,1]", 2), ("auto", 1)])
def test_a_forecast_is_of_all_devices_of_all_machines(devices, count, tmp_path, monkeypatch):
    monkeypatch.setattr("difftune.commands.prepare._cost", lambda *unused: None)
    machines = (f"trainer.devices={devices}", "trainer.num_nodes=2", "trainer.accumulate_grad_batches=3")
    prepare(*MODEL, *TRAIN, *machines, "data.check=false", f"run_dir={tmp_path}", check=True)
    forecast = json.loads((tmp_path / "data_check.json").read_text())["stages"][0]["forecast"]
    assert forecast["devices"] == 2 * count
    assert forecast["tokens_a_step"] == 64 * 2 * 3 * 2 * count


def test_a_forecast_of_an_adapter_measures_the_adapter_alone(teacher, tmp_path, monkeypatch):
    """Its optimiser and gradients are what the memory is forecast from."""
    trained = []

    def measure(module, data, accelerator, precision):
        trained.extend(name for name, parameter in module.model.named_parameters() if parameter.requires_grad)
        return StepCost(1.0, 1.0, 100)

    monkeypatch.setattr("difftune.commands.prepare.measure_step", measure)
    assert cli.main(["convert", str(teacher), "--to", "diff_v2", "--out", str(tmp_path / "base")]) == 0
    adapter = (f"model.path={tmp_path / 'base'}", "adapter.preset=attention", f"run_dir={tmp_path / 'run'}")
    prepare("tokenizer=digits", *TRAIN, *adapter, check=True)
    assert trained and all("lora_" in name or "lambda" in name for name in trained)


def test_streamed_rows_are_left_to_the_training_and_said_to_be(tmp_path, capsys):
    streamed = (*MODEL, *TRAIN, "data.streaming=true", f"run_dir={tmp_path / 'run'}")
    prepare(*streamed)
    assert "data.streaming=true: nothing is tokenised beforehand" in " ".join(capsys.readouterr().out.split())
    prepare(*streamed, check=True)
    shown = " ".join(capsys.readouterr().out.split())
    check = json.loads((tmp_path / "run" / "data_check.json").read_text())["stages"][0]
    # Of the first block, as the counts beside it.
    assert sum(check["histogram"]["counts"]) == check["statistics"]["kept"] == 120
    assert "passes over the data" not in shown and "an epoch has" not in shown


def test_rows_of_the_first_epoch_are_laid_beforehand(tmp_path, capsys, monkeypatch):
    recipe = (*MODEL, *TRAIN, "trainer.max_steps=2", f"run_dir={tmp_path}")
    prepare(*recipe)
    assert "rows an epoch from 120 documents" in " ".join(capsys.readouterr().out.split())
    assert [file.name for file in tmp_path.glob("cache/rows-*/epoch-*")] == ["epoch-0.bin"]
    monkeypatch.setattr("difftune.data.corpus.pack_best_fit", lambda *_: pytest.fail("packed again"))
    assert run.fit(load_config(None, recipe)) == 0
