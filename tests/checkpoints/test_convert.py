import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from difftune.checkpoints import convert as convert_file
from difftune.checkpoints.convert import convert_checkpoint
from difftune.checkpoints.load import load_model
from difftune.modeling.lambdas import WARMUP_STEP, warming_up
from tests.checkpoints.llamas import logits, make_llama, token_ids


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"1 missing \({NAME}\)"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"1 extra \(model\.extra\)"),
        (lambda t: t[NAME][0, 0].fill_(torch.nan), f"{NAME} in .* has 1 of 2304 values that are NaN or infinite"),
        (lambda t: t[NAME][0, 0].fill_(torch.inf), f"{NAME} in .* NaN or infinite: take a checkpoint from before"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), f"{NAME} in .* is torch.int8: quantised weights"),
    ],
    ids=["missing", "extra", "nan", "inf", "int8"],
)
def test_wrong_weights_are_refused_and_nothing_is_left(source: Path, tmp_path: Path, change, message: str) -> None:
    change_tensors(source, change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, "diff_v2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_wrong_conversion_is_an_error_and_leaves_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, "diff_v2", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def wrong(config, tensors):
        for name, tensor in right(config, tensors):
            yield name, tensor / 2 if name.endswith("layers.2.self_attn.o_proj.weight") else tensor

    right = convert_file.to_diff_v2
    monkeypatch.setattr(convert_file, "to_diff_v2", wrong)
    for target in (out, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"differs from .*source on random tokens: logits by up to .*, allowed"):
            convert_checkpoint(source, "diff_v2", target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interruption_while_writing_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config, tensors):
        for number, item in enumerate(tensors):
            if number == 12:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(convert_file, "to_diff_v2", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, "diff_v2", tmp_path / "out", max_shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rounding_is_not_called_exact(source: Path, tmp_path: Path) -> None:
    conversion = convert_checkpoint(source, "diff_v2", tmp_path / "out", dtype=torch.bfloat16)
    (difference,) = conversion.differences
    assert not conversion.exact and not difference.within_budget and difference.max_abs_logit < 0.5
    assert "rounded from torch.float32 to torch.bfloat16" in conversion.method
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if "lambda" not in name} == {torch.bfloat16}
    assert {t.dtype for name, t in stored.items() if "lambda" in name} == {torch.float32}
    wider = convert_checkpoint(tmp_path / "out", "llama", tmp_path / "wide", dtype=torch.float32)
    assert wider.exact and wider.differences[0].within_budget


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gemma3"},
            r"model_type 'gemma3', which is not readable; readable are: the Llama family .*qwen3",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            r"is quantised \(bitsandbytes\): packed weights are",
        ),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1: attention here has none; set it to 0"),
    ],
)
def test_models_of_another_kind_are_refused_and_nothing_is_left(
    source: Path, tmp_path: Path, fields: dict, message: str
) -> None:
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, "diff_v2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "diff_v3"}, "unknown target 'diff_v3': choose one of diff_v2, diff_v1, diffllama, unilm, llama"),
        (
            {"to": "diff_v2", "subln": "none"},
            "subln='none': only a softmax model that becomes diff_v1 has this choice; leave it out, source is softmax",
        ),
        (
            {"to": "diff_v2", "lambda_warmup_steps": 9},
            "lambda_warmup_steps=9: only a softmax model that becomes diff_v1",
        ),
        ({"to": "diffllama", "lambda_warmup_steps": 9}, "lambda_warmup_steps=9: .* the target is diffllama"),
        ({"to": "diff_v1", "lambda_warmup_steps": -1}, r"lambda_warmup_steps=-1 .*must be 0, or a number of optimiser"),
        ({"to": "diff_v1", "lambda_init": 1.0}, r"lambda_init=1\.0: must be below 1"),
        ({"to": "diff_v2", "out_dir": "source"}, "exists: choose another folder"),
        ({"to": "diff_v2", "out_dir": "source", "overwrite": True}, "is the source itself: choose another folder"),
        ({"to": "diff_v2", "text": "empty.txt"}, r"empty\.txt is empty"),
        ({"to": "diff_v2", "text": "binary.txt"}, r"binary\.txt is not UTF-8 text"),
        ({"to": "diff_v2", "text": "text.txt"}, r"the source has no tokenizer, so text\.txt cannot be read"),
    ],
)
def test_wrong_requests_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("text.txt").write_text("hello")
    before = sorted(tmp_path.iterdir())
    options = {"out_dir": "out", **options}
    if "text" in options:
        options["text"] = Path(options["text"])
    with pytest.raises(ValueError, match=message):
        convert_checkpoint("source", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_kinds_that_do_not_become_one_another_are_refused(tmp_path: Path, make_model) -> None:
    for kind in ("diff_v1", "diff_v2"):
        make_model(attention=kind).save_pretrained(tmp_path / kind)
    with pytest.raises(ValueError, match="a diff_v1 model is not converted to diff_v2"):
        convert_checkpoint(tmp_path / "diff_v1", "diff_v2", tmp_path / "out")
    with pytest.raises(ValueError, match="diff_v2, which is not converted to diff_v1: its keys and values are others"):
        convert_checkpoint(tmp_path / "diff_v2", "diff_v1", tmp_path / "out")
    make_llama(num_attention_heads=9, num_key_value_heads=3, hidden_size=54).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="num_attention_heads=9, num_key_value_heads=3: diff_v1 pairs heads"):
        convert_checkpoint(tmp_path / "odd", "diff_v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("subln", ["none", "plain"])
def test_lambda_can_start_near_zero_and_be_warmed_up(tmp_path: Path, source: Path, subln: str) -> None:
    options = {"subln": subln, "lambda_init": 0.4}
    conversion = convert_checkpoint(source, "diff_v1", tmp_path / "warm", lambda_warmup_steps=10**6, **options)
    assert "lambda warmed up over 1,000,000 optimiser steps" in (tmp_path / "warm" / "README.md").read_text()
    model = load_model(tmp_path / "warm")
    assert all(0 < layer.self_attn.lambda_full().item() < 1e-6 for layer in model.model.layers)
    # What was measured is the model as it starts: with no norm, that of lambda 0.
    convert_checkpoint(source, "diff_v1", tmp_path / "zero", subln=subln, lambda_init=0.0)
    ids = token_ids(2, 30)
    torch.testing.assert_close(logits(model, ids), logits(load_model(tmp_path / "zero"), ids), rtol=0, atol=1e-4)
    # At the end it is the model of the same lambda without a warm-up, but for the scale that training has to find.
    convert_checkpoint(source, "diff_v1", tmp_path / "cold", **options)
    cold = load_model(tmp_path / "cold")
    model.warm_up_lambda(0)
    if subln == "none":
        for layer in cold.model.layers:
            layer.self_attn.o_proj.weight.data *= 1 - 0.4
    torch.testing.assert_close(logits(model, ids), logits(cold, ids), rtol=0, atol=1e-5)
    assert not conversion.exact


def test_a_warm_up_stays_in_our_format_until_it_has_ended(tmp_path: Path, make_model) -> None:
    model = make_model(lambda_warmup_steps=20, subln="plain", head_dim=None)
    for step, refused in ((7, True), (20, False)):
        for module in warming_up(model):
            module.get_buffer(WARMUP_STEP).fill_(step)
        folder = tmp_path / f"at{step}"
        model.save_pretrained(folder)
        convert_checkpoint(folder, "diff_v1", tmp_path / f"ours{step}", dtype=torch.bfloat16)
        again = load_model(tmp_path / f"ours{step}")
        assert [int(module.get_buffer(WARMUP_STEP)) for module in warming_up(again)] == [step] * 3
        for to in ("diffllama", "unilm"):
            out = tmp_path / f"{to}{step}"
            if refused:
                with pytest.raises(
                    ValueError, match=r"warmup_step: lambda is at step 7 of the 20 .* Train on to its end"
                ):
                    convert_checkpoint(folder, to, out)
                assert not out.exists()
            else:
                assert convert_checkpoint(folder, to, out).exact
                assert not any(WARMUP_STEP in name for name in load_file(out / "model.safetensors"))


def test_float64_is_compared_in_float64(source: Path, tmp_path: Path) -> None:
    (difference,) = convert_checkpoint(source, "diff_v2", tmp_path / "out", dtype=torch.float64).differences
    assert difference.within_budget and load_model(tmp_path / "out").dtype == torch.float64
