"""Checks across keys: each told, all together, with the remedy."""

import pytest

from difftune.config import load_config
from difftune.tasks.math import MathTaskConfig

ENOUGH = ("tokenizer=digits", "data.train=[{path: a.jsonl}]", "trainer.max_steps=10")


def refusal(*overrides: str, command: str = "fit") -> list[str]:
    with pytest.raises(ValueError) as failure:
        load_config(None, [*(ENOUGH if command == "fit" else ()), *overrides], command=command)
    return [line.strip() for line in str(failure.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tokenizer=null"], "tokenizer: a fresh model needs one (digits, bytes, a folder or a hub id)"),
        (["model.path=m", "model.head_dim=8"], "model.path: the architecture comes with the weights"),
        (["adapter={}"], "adapter: needs a base that is on disk, a fresh one would be saved nowhere; set model.path"),
        (
            ["model.path=m", "adapter={preset: attention, targets: [q1_proj]}"],
            "adapter.targets: ['q1_proj'] and preset attention exclude one another; drop one",
        ),
        (["data.train=[]"], "data.train: nothing to train on; set data.train=[{path: FILE}]"),
        (
            ["data.seq_len=128", "model.max_position_embeddings=64"],
            "data.seq_len: 128 is more than model.max_position_embeddings, 64",
        ),
        (
            ["trainer.max_steps=-1"],
            "trainer.max_steps: training would never end; set max_steps, max_epochs or max_time",
        ),
        (["trainer.max_steps=0"], "trainer.max_steps: 0 trains nothing"),
        (["trainer.max_time=8h"], "trainer.max_time: must be DD:HH:MM:SS, such as 00:08:00:00, got '8h'"),
        (["trainer.precision=16-mixed", "trainer.accelerator=cpu"], "trainer.precision: 16-mixed needs a GPU"),
        (["optim.warmup_steps=10"], "optim.warmup_steps: 10 must be less than trainer.max_steps, 10"),
        (
            ["optim.schedule=constant", "optim.min_lr_ratio=0.1"],
            "optim.min_lr_ratio: a constant schedule does not decay",
        ),
        (["distill.weight=0.7"], "distill.teacher: the other keys of distill do nothing without one"),
        (
            ["distill.teacher=t", "distill.divergence=generalized_jsd", "distill.beta=1.0"],
            "distill.beta: must be below 1, got 1; the limit is reverse_kl",
        ),
        (
            ["distill.teacher=t", "distill.top_k=4", "data.streaming=true"],
            "distill.top_k: a stored teacher belongs to a tokenised set",
        ),
        (
            ["distill.teacher=t", "distill.align_weight=1"],
            "distill.align_weight: works for align_steps steps; set both",
        ),
        (
            ["distill.teacher=t", "distill.align_weight=1", "distill.align_steps=9", "distill.top_k=4"],
            "distill.align_weight: needs the teacher in the process; leave out top_k",
        ),
        (
            ["distill.teacher=t", "distill.on_policy_share=0.5", "distill.top_k=4"],
            "distill.on_policy_share: what the student will write is not known when a teacher is stored; leave out",
        ),
        (
            ["distill.teacher=t", "trainer.strategy=fsdp", "trainer.fsdp.tensor_parallel_size=2"],
            "trainer.fsdp.tensor_parallel_size: divides the student's head, which is compared with the teacher's whole",
        ),
        (
            ["export={format: diffllama}", "model.attention=diff_v2"],
            "export.format: diffllama holds diff_v1 only, and model.attention is",
        ),
        (
            ["model.path=m", "model.quantization=nf4"],
            "model.quantization: nf4 weights are not trained themselves; set adapter, or leave it out",
        ),
        (["stages=[{name: a}, {name: a}]"], "stages: the name 'a' stands twice"),
        (["stages=[{name: a b}]"], "stages: 'a b' cannot name a stage"),
        (["stages=[{name: '1'}]"], "stages: '1' cannot name a stage"),
        (["evaluation.tasks=[{path: x/a.jsonl}, {path: y/a.jsonl}]"], "evaluation.tasks: two tasks are named 'a'"),
        (["evaluation.num_samples=4"], "evaluation.num_samples: 4 greedy answers are all the same; set temperature"),
        (["evaluation.every_n_steps=5"], "evaluation.every_n_steps: there are no evaluation.tasks"),
        (["evaluation.every_fraction=0.5"], "evaluation.every_fraction: there are no evaluation.tasks"),
        (["evaluation.patience=3"], "evaluation.patience: waits for a better checkpoint.best_metric; set that"),
        (
            ["checkpoint.best_metric=eval/mean/accuracy", "evaluation.tasks=[{path: a}]"],
            "checkpoint.best_metric: 'eval/mean/accuracy' is not measured; one of eval/a/accuracy",
        ),
        (["checkpoint.best_metric=eval/a/accuracy"], "checkpoint.best_metric: 'eval/a/accuracy' is not measured"),
        (["checkpoint.best_metric=train/loss"], "checkpoint.best_metric: 'train/loss' is not measured"),
        (
            ["checkpoint.best_metric=eval/a/accuracy", "evaluation.tasks=[{path: b.jsonl}]"],
            "checkpoint.best_metric: 'eval/a/accuracy' is not measured; one of eval/b/accuracy",
        ),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(overrides: list[str], expected: str) -> None:
    (problem,) = refusal(*overrides)
    assert problem.startswith(expected)


def test_problems_are_collected_and_name_their_stage() -> None:
    found = refusal("tokenizer=null", "trainer.max_steps=-1", "stages=[{name: a}, {name: b, trainer: {max_epochs: 1}}]")
    assert [problem.split(";")[0] for problem in found] == [
        "tokenizer: a fresh model needs one (digits, bytes, a folder or a hub id)",
        "stage 'a': trainer.max_steps: training would never end",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.path=m", "model.max_position_embeddings=65536", "model.rope_parameters={rope_theta: 640000.0}"],
        ["model.path=m", "model.lambda_warmup_steps=100"],
        ["trainer.max_steps=-1", "trainer.max_time=00:00:10:00"],
        ["checkpoint.best_metric=eval/a/accuracy", "evaluation.tasks=[{path: x/a.jsonl}]"],
        ["checkpoint.best_metric=eval/a/mean_length", "checkpoint.best_mode=min", "evaluation.tasks=[{path: a}]"],
        ["evaluation.num_samples=4", "evaluation.temperature=0.6"],
        [
            "checkpoint.best_metric=eval/mean/accuracy",
            "evaluation.tasks=[{path: a}, {path: b}]",
            "evaluation.patience=2",
        ],
        ["checkpoint.best_metric=eval/needle/accuracy_128", "evaluation.tasks=[{kind: needle, lengths: [128, 256]}]"],
        ["export={format: difftune}", "model.attention=diff_v2"],
        ["model.path=m", "adapter={targets: [q2_proj, v_proj], ranks: {negative: 2}}"],
    ],
)
def test_keys_that_do_fit_are_accepted(overrides: list[str]) -> None:
    assert load_config(None, [*ENOUGH, *overrides]).tokenizer == "digits"


def test_other_commands_need_a_model_but_no_training() -> None:
    assert load_config(None, ["model.path=m"], command="generate").model.path == "m"
    assert refusal("tokenizer=digits", command="export") == ["model.path: export needs a model; give --model DIR"]
    assert refusal("model.path=m", command="evaluate") == [
        "evaluation.tasks: nothing to evaluate; give --data FILE, or a recipe with tasks"
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [("data/gsm8k.jsonl", "gsm8k"), ("synthetic:arithmetic", "arithmetic"), ("openai/gsm8k", "gsm8k")],
)
def test_a_task_is_named_after_its_path(path: str, name: str) -> None:
    assert MathTaskConfig(path=path).task_name() == name
    assert MathTaskConfig(path=path, name="mine").task_name() == "mine"


def test_a_fresh_model_is_not_quantised_and_an_export_neither() -> None:
    [first, _] = refusal("model.quantization=nf4")
    assert first.startswith("model.quantization: nf4 of a fresh model keeps nothing that was learned; set model.path")
    [only] = refusal("model.path=m", "model.quantization=nf4", command="export")
    assert only.startswith("model.quantization: export writes whole weights, not nf4; leave it out")
    assert load_config(None, ["model.path=m", "model.quantization=nf4"], command="generate").model.quantization == "nf4"
