"""The distillation recipes through the command line, from a Llama's folder to an exported student, at small size."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from difftune import cli
from difftune.checkpoints.load import load_model
from tests.conftest import ROOT
from tests.training.teaching import TOKENIZER, build_llama

STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher's folder, two students converted from it, and rows as of GSM8K."""
    folder = tmp_path_factory.mktemp("distillation")
    # A head dim of 16, and key/value heads that V1 can pair.
    build_llama(hidden_size=64, max_position_embeddings=256, initializer_range=0.1).save_pretrained(folder / "teacher")
    TOKENIZER.save_pretrained(folder / "teacher")
    for kind in ("diff_v1", "diff_v2"):
        command = ["convert", str(folder / "teacher"), "--to", kind, "--out", str(folder / kind)]
        assert cli.main(command) == 0
    for name, numbers in (("train", range(40)), ("test", range(90, 93))):
        rows = [
            {"question": f"Ann has {n} pens and buys {n % 7}. How many?", "answer": f"{n}+{n % 7}\n#### {n + n % 7}"}
            for n in numbers
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(place, name, recipe, student, *overrides, flags=()):
    settings = {
        "model.path": place / student,
        "distill.teacher": place / "teacher",
        "data.train.0.path": place / "train.jsonl",
        "data.seq_len": 128,
        "data.cache_dir": place / "cache",
        "evaluation.tasks.0.path": place / "test.jsonl",
        "evaluation.max_new_tokens": 8,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_steps": STEPS,
        "trainer.log_every_n_steps": 1,
        "optim.warmup_steps": 1,
        "logging.loggers": "[jsonl]",
        "logging.progress_bar": "false",
        "run_dir": place / name,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return [
        *(["prepare", "--teacher"] if "--teacher" in flags else ["fit"]),
        *("--config", str(ROOT / "recipes" / f"{recipe}.yaml")),
        *given,
        *overrides,
    ]


def metric(place, name, figure):
    lines = map(json.loads, (place / name / "metrics.jsonl").read_text().splitlines())
    return [line["value"] for line in lines if line["name"] == figure]


def check(place, name):
    """It trained to the end, was evaluated, and wrote a model that loads."""
    assert len(metric(place, name, "train/divergence")) == STEPS
    assert len(metric(place, name, "eval/gsm8k/accuracy")) == 2
    assert all(parameter.isfinite().all() for parameter in load_model(place / name / "export").parameters())


def test_an_online_teacher_through_the_command_line(place, capsys):
    assert cli.main(command(place, "online", "distil_online", "diff_v2", "distill.teacher_dtype=float32")) == 0
    check(place, "online")
    # An exact conversion says at first what its teacher says.
    assert metric(place, "online", "train/divergence")[0] < 1e-6
    assert "gsm8k" in capsys.readouterr().out


def test_a_stored_teacher_through_the_command_line(place, capsys):
    top_k = ("distill.top_k=8", "distill.teacher_dtype=float32")
    missing = command(place, "top_k", "distil_topk", "diff_v1", *top_k)
    assert cli.main(missing) == 2
    assert "run `difftune prepare --teacher`" in " ".join(capsys.readouterr().err.split())
    assert cli.main(command(place, "top_k", "distil_topk", "diff_v1", *top_k, flags=["--teacher"])) == 0
    (place / "teacher" / "model.safetensors").rename(place / "weights")
    try:
        assert cli.main(missing) == 0, "the teacher is not needed any more"
    finally:
        (place / "weights").rename(place / "teacher" / "model.safetensors")
    check(place, "top_k")
    first, *_, last = metric(place, "top_k", "train/divergence")
    assert first > 1e-4 and last < first


def test_a_v1_conversion_recovers_on_its_own_texts_through_the_command_line(place):
    options = ("distill.on_policy_share=0.5", "distill.on_policy_max_new_tokens=8", "distill.divergence=reverse_kl")
    assert cli.main(command(place, "recover", "recover_v1", "diff_v1", *options)) == 0
    check(place, "recover")
    assert [tokens > 0 for tokens in metric(place, "recover", "train/on_policy_tokens")] == [False, True] * 3
    teacher = AutoModelForCausalLM.from_pretrained(place / "teacher")
    student, start = load_model(place / "recover" / "export"), load_model(place / "diff_v1")
    ids = torch.tensor([TOKENIZER("Ann has 9 pens and buys 2. How many?")["input_ids"]])
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (teacher, start, student)]
    assert (logits[2] - logits[0]).norm() < (logits[1] - logits[0]).norm()
