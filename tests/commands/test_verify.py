"""What `difftune verify` prints and returns; what it tries is tested in tests/verification, and as a whole in
tests/integration."""

import pytest
import torch

from difftune import cli
from difftune.commands import verify
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.verification.claim import Claim, not_tried

GOOD = Claim("packed = alone", "logits", "holds", "a logit differs by 1.0e-07, allowed 2.0e-07")
BAD = Claim("cache = whole", "logits", "fails", "a logit differs by 1.0e+00, allowed 2.0e-07")


@pytest.fixture
def model_folder(tmp_path):
    config = DiffTransformerConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    DiffTransformerForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def claims(monkeypatch):
    """What is found, and the models, dtypes and devices that it was asked of."""
    found = {
        "verify_model": [GOOD],
        "verify_backends": [],
        "verify_files": [],
        "verify_precisions": [],
        "verify_training": [],
    }
    asked = []

    def stand_in(name):
        def verified(subject, *more, **options):
            asked.append((name, getattr(subject, "dtype", None), more, options))
            yield from found[name]

        return verified

    for name in found:
        monkeypatch.setattr(verify, name, stand_in(name))
    return found, asked


def test_what_holds_is_shown_under_what_it_was_found_on(claims, model_folder, capsys):
    claims[0]["verify_training"] = [not_tried("two devices = one", "training", "needs two devices, found 1")]
    assert cli.main(["verify", "--model", model_folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{model_folder}: diff_v1, ") and lines[0].endswith(" parameters, float32 on cpu")
    assert lines[1:] == [
        "logits",
        "  holds     packed = alone: a logit differs by 1.0e-07, allowed 2.0e-07",
        "training",
        "  not tried two devices = one: needs two devices, found 1",
        "1 hold, 0 fail, 1 could not be tried here",
    ]


@pytest.mark.parametrize(
    "place", ["verify_backends", "verify_model", "verify_files", "verify_precisions", "verify_training"]
)
def test_one_failure_anywhere_is_the_exit_code(claims, model_folder, capsys, place):
    claims[0][place] = [BAD, GOOD]
    assert cli.main(["verify", "--model", model_folder]) == 1
    printed = capsys.readouterr().out
    assert "  fails     cache = whole: a logit differs by 1.0e+00, allowed 2.0e-07" in printed
    assert (
        printed.splitlines()[-1]
        == ("1" if place == "verify_model" else "2") + " hold, 1 fail, 0 could not be tried here"
    )


def test_without_a_model_one_of_each_kind_is_tried(claims, capsys):
    assert cli.main(["verify"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a fresh model")]
    assert [line.split()[3] for line in heads] == ["diff_v1,", "diff_v2,", "softmax,"]


def test_float32_is_tried_beside_the_dtype_of_the_model(claims, model_folder):
    assert cli.main(["verify", "--model", model_folder, "--dtype", "bfloat16"]) == 0
    asked = claims[1]
    assert [more[1] for name, _, more, _ in asked if name == "verify_backends"] == [torch.float32, torch.bfloat16]
    assert [dtype for name, dtype, _, _ in asked if name == "verify_model"] == [torch.bfloat16]
    assert [options for name, _, _, options in asked if name == "verify_training"] == [
        {"accelerator": "cpu", "devices": 2}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "--device must be one of cpu, cuda, auto, got 'tpu'"),
        (["--model", "/nowhere"], "/nowhere does not exist"),
        (["seed=1"], "verify reads no recipe: it takes its own options; see difftune verify --help"),
        (["--config", "x.yaml"], "verify reads no recipe: it takes its own options; see difftune verify --help"),
    ],
)
def test_wrong_input_is_refused(claims, capsys, arguments, message):
    assert cli.main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(claims, capsys):
    assert cli.main(["verify", "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no CUDA device here" in capsys.readouterr().err
