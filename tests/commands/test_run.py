import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from difftune.builder import build_data, build_tasks, build_tokenizer
from difftune.checkpoints.load import load_model
from difftune.commands import run
from difftune.config import load_config
from difftune.data.tokenizers import build_tokenizer as build_named_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from tests.conftest import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
# Both stages of the quickstart, three steps each, on few problems.
SHORT = (
    "trainer.max_steps=3",
    "optim.warmup_steps=1",
    "data.train.*.options.count=200",
    "evaluation.tasks.*.limit=8",
    "evaluation.batch_size=8",
    "evaluation.max_new_tokens=6",
    "logging.loggers=[jsonl]",
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "checkpoint.every_n_steps=2",
)


# The same as one stage, whose data are given apart.
ONE_STAGE = (*(o for o in SHORT if not o.startswith("data.")), "stages=[]", "export=null")


# For commands that load a model, whose architecture comes with it.
LOADED = tuple(o for o in SHORT if not o.startswith("model."))


def config_of(run_dir, *overrides, command="fit", short=SHORT):
    return load_config(QUICKSTART, [*short, f"run_dir={run_dir}", *overrides], command=command)


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished")
    assert run.fit(config_of(run_dir)) == 0
    return run_dir


def test_a_run_folder_holds_what_later_readers_need(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "export",
        "tokenizer",
    } <= names
    assert {path.name for path in (finished / "samples").iterdir()} >= {
        "answers-0.jsonl",
        "answers-3.jsonl",
        "traces-3.jsonl",
    }
    environment = json.loads((finished / "environment.json").read_text())
    assert (
        environment["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in environment["packages"]["torch"]
    )
    reloaded = load_config(finished / "config.yaml", [], command="fit")
    assert reloaded == config_of(finished)


def test_metrics_are_logged_for_every_stage(finished):
    lines = metrics_of(finished)
    names = {(line["stage"], line["name"]) for line in lines}
    for stage in ("answers", "traces"):
        for name in ("train/loss", "train/lr", "perf/tokens_per_s", "lambda/layer_00", "eval/arithmetic/accuracy"):
            assert (stage, name) in names
    assert {line["step"] for line in lines if line["name"] == "train/loss"} == {1, 3}


def test_plain_transformers_loads_the_export_and_agrees(finished):
    theirs = AutoModelForCausalLM.from_pretrained(finished / "export")
    assert type(theirs).__name__ == "DiffLlamaForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    ids = torch.tensor(
        [tokenizer.apply_chat_template([{"role": "user", "content": "3+4"}], return_dict=True)["input_ids"]]
    )
    ours = load_model(finished / "checkpoints" / "traces" / "step-00000003")
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)


def test_each_stage_starts_from_the_last(finished):
    # Three steps at this rate move the weights little; two fresh models would be far apart.
    first = load_model(finished / "checkpoints" / "answers" / "step-00000003").state_dict()
    second = load_model(finished / "checkpoints" / "traces" / "step-00000003").state_dict()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[weight], second[weight])
    assert (first[weight] - second[weight]).norm() < 0.7 * first[weight].norm()


def test_called_again_the_ended_stages_are_passed_over(finished):
    before = metrics_of(finished)
    assert run.fit(config_of(finished)) == 0
    assert metrics_of(finished) == before


def test_a_later_end_goes_on_from_the_last_checkpoint(tmp_path):
    base = ("data.train=[{path: 'synthetic:arithmetic', options: {count: 200}}]", "optim.schedule=constant")
    base += ("optim.min_lr_ratio=0",)
    run.fit(config_of(tmp_path / "straight", *base, "trainer.max_steps=5", short=ONE_STAGE))
    run.fit(config_of(tmp_path / "twice", *base, "trainer.max_steps=3", short=ONE_STAGE))
    run.fit(config_of(tmp_path / "twice", *base, "trainer.max_steps=5", short=ONE_STAGE))
    straight, twice = (
        load_model(tmp_path / name / "checkpoints" / "main" / "step-00000005") for name in ("straight", "twice")
    )
    for (name, expected), actual in zip(straight.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_resume_never_refuses_a_folder_with_a_run(finished):
    with pytest.raises(ValueError, match="holds a run already, and resume is never: choose another run_dir"):
        run.fit(config_of(finished, "resume=never"))


def test_another_model_refuses_the_folder_of_a_run(finished):
    with pytest.raises(ValueError, match=r"holds a run with model=.*choose another run_dir"):
        run.fit(config_of(finished, "model.num_hidden_layers=1"))


def test_dry_run_takes_a_step_shows_a_sample_and_writes_nothing(tmp_path, capsys):
    assert run.fit(config_of(tmp_path / "dry"), dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "one step on one micro-batch: loss" in shown and "<|assistant|>" in shown and "rows kept" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_dry_run_steps_and_generates_in_the_precision_of_the_recipe(tmp_path, capsys, monkeypatch, precision):
    dtypes = set()
    right = DiffTransformerForCausalLM.generate

    def generate(self, *arguments, **options):
        dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return right(self, *arguments, **options)

    monkeypatch.setattr(DiffTransformerForCausalLM, "generate", generate)
    config = config_of(tmp_path / "dry", f"trainer.precision={precision}")
    assert run.fit(config, dry_run=True) == 0
    assert dtypes == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    shown = " ".join(capsys.readouterr().out.split())
    assert f"4 tokens generated for each of two prompts; step and batch in {precision}" in shown


@pytest.mark.usefixtures("padding_fails_in_half")
def test_dry_run_refuses_a_precision_in_which_no_evaluation_could_generate(tmp_path):
    assert run.fit(config_of(tmp_path / "dry"), dry_run=True) == 0
    message = (
        "a padded batch of two generated texts in bf16-mixed fails: value cannot be converted without overflow; "
        "set trainer.precision=32-true, or choose another model.attention_backend"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        run.fit(config_of(tmp_path / "dry", "trainer.precision=bf16-mixed"), dry_run=True)


def test_dry_run_of_a_model_that_cannot_fit_takes_no_step_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("difftune.commands.dry_run.total_memory_bytes", lambda: 10_000)
    assert run.fit(config_of(tmp_path / "dry"), dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "No step was taken: the model does not fit this machine" in shown.replace("\n", " ")


@pytest.mark.parametrize("kind", ["diff_v2", "softmax"])
def test_the_quickstart_runs_and_learns_with_the_other_kinds(tmp_path, kind):
    assert run.fit(config_of(tmp_path, f"model.attention={kind}", "trainer.max_steps=30")) == 0
    assert load_model(tmp_path / "export").config.attention == kind
    losses = {line["stage"]: [] for line in metrics_of(tmp_path)}
    for line in metrics_of(tmp_path):
        if line["name"] == "train/loss":
            losses[line["stage"]].append(line["value"])
    assert all(of_stage[-1] < 0.7 * of_stage[0] for of_stage in losses.values()), losses


@pytest.mark.parametrize("name", ["math_stage1", "math_stage2"])
def test_the_papers_recipes_dry_run_on_local_files(name, tmp_path, capsys):
    rows = [
        {"problem": f"Compute {i}+1.", "generated_solution": f"It is {i + 1}.", "expected_answer": str(i + 1)}
        for i in range(40)
    ]
    if name == "math_stage2":
        trace = (
            "<|begin_of_thought|>\n\n{0}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{0}\n\n<|end_of_solution|>"
        )
        rows = [
            {
                "conversations": [
                    {"from": "user", "value": row["problem"]},
                    {"from": "assistant", "value": trace.format(row["generated_solution"])},
                ],
                "correct": i % 4 > 0,
                "solution": "reference",
            }
            for i, row in enumerate(rows)
        ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    small = ("num_hidden_layers=2", "hidden_size=64", "intermediate_size=64", "num_attention_heads=4", "head_dim=16")
    overrides = [
        *(f"model.{key}" for key in (*small, "num_key_value_heads=4", "vocab_size=null", "path=null")),
        "tokenizer=bytes",
        "data.seq_len=512",
        "data.micro_batch_size=1",
        f"data.train=[{{path: {tmp_path / 'train.jsonl'}}}]",
        f"evaluation.tasks=[{{path: {tmp_path / 'test.jsonl'}, name: gsm8k}}]",
    ]
    config = load_config(ROOT / "recipes" / f"{name}.yaml", overrides)
    assert run.fit(config, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "one step on one micro-batch: loss" in shown and "evaluation gsm8k: 1 problems" in shown
    if name == "math_stage2":
        assert "<think>" in shown and "reference" not in shown and "answer not verified as correct  10" in shown


def test_evaluate_prints_and_writes_figures_with_an_interval(finished, tmp_path, capsys):
    config = config_of(
        finished, f"model.path={finished / 'export'}", "tokenizer=null", command="evaluate", short=LOADED
    )
    results = run.evaluate(config, out=tmp_path)
    assert results["arithmetic"]["n"] == 8 and len(results["arithmetic"]["interval"]) == 2
    assert json.loads((tmp_path / "results.json").read_text())["tasks"] == results
    assert len((tmp_path / "samples" / "arithmetic.jsonl").read_text().splitlines()) == 8
    assert "accuracy of" in capsys.readouterr().out


def test_a_checkpoint_is_evaluated_with_the_tokenizer_of_its_run(finished):
    checkpoint = finished / "checkpoints" / "traces" / "step-00000003"
    config = config_of(finished, f"model.path={checkpoint}", "tokenizer=null", command="generate", short=LOADED)
    assert len(run.generate(config, ["3+4", "12-5"])) == 2


def test_through_a_pipe_come_the_answers_alone_and_unbroken(finished, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("difftune"), "handlers", [])
    overrides = (f"model.path={finished / 'export'}", "tokenizer=null", "evaluation.max_new_tokens=100000")
    config = config_of(finished, *overrides, command="generate", short=LOADED)
    answers = run.generate(config, ["3+4", "12-5"], system="Be brief.", may_shorten=True)
    said = capsys.readouterr()
    assert said.out == "".join(f"{answer}\n" for answer in answers) and "3+4" not in said.out
    # Our own default gives way to the context of the model, and nobody is warned of it.
    assert "max_position_embeddings" not in said.err + said.out


def test_a_system_turn_without_a_template_is_refused(half_precision, tmp_path):
    config = config_of(tmp_path, f"model.path={half_precision}", "tokenizer=null", command="generate", short=LOADED)
    with pytest.raises(ValueError, match="--system needs a chat template"):
        run.generate(config, ["How many"], system="Be brief.")


def test_export_writes_the_format_that_is_asked_for(finished, tmp_path):
    config = config_of(
        finished,
        f"model.path={finished / 'export'}",
        "tokenizer=null",
        "export.format=difftune",
        command="export",
        short=LOADED,
    )
    report = run.export(config, tmp_path / "out")
    assert report.max_abs_difference == 0.0 and load_model(tmp_path / "out").config.attention == "diff_v1"


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model's embedding 8 rows"):
        run.fit(config_of(tmp_path, "model.vocab_size=8"))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, tmp_path, our_log):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints" / "traces"
    (checkpoints / "done.json").unlink()
    newest = checkpoints / "step-00000003" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run.fit(config_of(tmp_path / "run")) == 0
    assert any(
        "falling back to checkpoint" in r.getMessage() and "bytes instead of" in r.getMessage() for r in our_log.records
    )
    straight, again = (load_model(d / "export") for d in (finished, tmp_path / "run"))
    for expected, actual in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_held_out_problems_that_are_trained_on_are_named(tmp_path, our_log):
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[3]) + "\n")
    source = f"data.train=[{{path: {tmp_path / 'train.jsonl'}, answer_only: true}}]"
    task = f"evaluation.tasks=[{{path: {tmp_path / 'test.jsonl'}, name: test}}]"
    run.fit(config_of(tmp_path / "run", source, task, short=ONE_STAGE))
    assert any("1 of the 1 problems of test are also in the training data" in r.getMessage() for r in our_log.records)


def test_the_quickstart_problems_are_unseen(tmp_path):
    config = load_config(QUICKSTART, [f"run_dir={tmp_path}"], command="fit")
    tokenizer = build_tokenizer(config)
    for stage in config.resolved_stages():
        data = build_data(stage, tokenizer, None)
        for task in build_tasks(stage.evaluation):
            assert len(task.problems) == 200 and data.seen(task.problems) == []


def test_what_ends_a_text_is_in_checkpoint_and_export(finished):
    end = build_tokenizer(config_of(finished)).eos_token_id
    for folder in (finished / "checkpoints" / "traces" / "step-00000003", finished / "export"):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text())["eos_token_id"] == end, (folder, name)


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory):
    """A model in bfloat16 whose generation config has an end that its tokenizer, without a chat template, has not."""
    folder = tmp_path_factory.mktemp("half")
    tokenizer = build_named_tokenizer("bytes")
    tokenizer.chat_template = None
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = DiffTransformerConfig(vocab_size=262, num_key_value_heads=2, attention="diff_v2", eos_token_id=5, **sizes)
    model = DiffTransformerForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[5, 9], temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_export_keeps_type_and_sampling_and_says_every_end(half_precision, tmp_path):
    config = config_of(tmp_path, f"model.path={half_precision}", "tokenizer=null", command="export", short=LOADED)
    run.export(config, tmp_path / "out")
    written = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "generation_config")
    }
    assert written["config"]["dtype"] == "bfloat16"
    assert written["config"]["eos_token_id"] == written["generation_config"]["eos_token_id"] == [2, 5, 9]
    assert written["generation_config"]["temperature"] == 0.7


def test_generate_continues_a_text_without_a_chat_template_and_refuses_a_broken_one(half_precision, tmp_path, our_log):
    overrides = (f"model.path={half_precision}", "tokenizer=null")
    config = config_of(tmp_path, *overrides, command="generate", short=LOADED)
    assert len(run.generate(config, ["How many"])) == 1
    assert "continues the prompts as text" in our_log.text
    for template, message in (
        ("{{ raise_exception('needs a system turn') }}", "the prompt: .* needs a system turn"),
        ("{{ 1 + messages }}", "the prompt: the chat template fails on it: TypeError"),
        ("{% if %}", "chat_template: it is broken, line 1"),
    ):
        config.chat_template = template
        with pytest.raises(ValueError, match=message):
            run.generate(config, ["How many"])


def test_a_model_without_a_row_for_a_token_is_refused_by_every_command(half_precision, tmp_path):
    tokenizer = build_named_tokenizer("bytes")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "large")
    overrides = (f"model.path={half_precision}", f"tokenizer={tmp_path / 'large'}")
    for command, act in (
        ("generate", lambda config: run.generate(config, ["1"])),
        ("export", lambda config: run.export(config, tmp_path / "out")),
    ):
        with pytest.raises(ValueError, match="the tokenizer has 264 tokens, the model's embedding 262 rows"):
            act(config_of(tmp_path, *overrides, command=command, short=LOADED))
