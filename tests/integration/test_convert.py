"""Whole conversions of tiny models, from a folder to a folder, as the command does them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from difftune import cli
from difftune.checkpoints.convert import convert_checkpoint
from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerForCausalLM
from tests.checkpoints.llamas import cached_logits, each_kind, logits, make_llama, token_ids, truly_float64
from tests.conftest import ROOT

__all__ = ["truly_float64"]  # a fixture
MADE_BY_V2 = ("q1_proj", "q2_proj", "lambda_proj")


def convert_v2(tmp_path: Path, model_type: str, **changes: Any) -> tuple[Any, DiffTransformerForCausalLM]:
    source = make_llama(model_type, **changes)
    source.save_pretrained(tmp_path / "source")
    conversion = convert_checkpoint(tmp_path / "source", "diff_v2", tmp_path / "out")
    assert conversion.exact
    return source, load_model(tmp_path / "out")


@each_kind
def test_v2_has_the_logits_of_the_original(tmp_path: Path, truly_float64: None, model_type: str, changes) -> None:
    source, ours = convert_v2(tmp_path, model_type, **changes)
    ids = token_ids(2, 40)
    expected = logits(source, ids)
    scale = expected.abs().max().item()
    assert scale > 1
    assert (logits(ours, ids) - expected).abs().max() <= 1e-5 * scale
    assert (cached_logits(ours, ids, 30) - cached_logits(source, ids, 30)).abs().max() <= 1e-5 * scale

    source, ours = source.double(), ours.double()
    expected = logits(source, ids)
    assert (logits(ours, ids) - expected).abs().max() <= 1e-12 * scale
    assert (cached_logits(ours, ids, 30) - expected).abs().max() <= 1e-12 * scale
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids[:, :9], **options), source.generate(ids[:, :9], **options))


@each_kind
def test_v2_keeps_the_cache_as_it_was(tmp_path: Path, model_type: str, changes) -> None:
    source, ours = convert_v2(tmp_path, model_type, **changes)
    ids = token_ids(2, 20)
    with torch.no_grad():
        before, after = (model(input_ids=ids, use_cache=True).past_key_values for model in (source, ours))
    assert len(before.layers) == len(after.layers) == ours.config.num_hidden_layers
    for old, new in zip(before.layers, after.layers, strict=True):
        for kind in ("keys", "values"):
            torch.testing.assert_close(getattr(new, kind), getattr(old, kind), rtol=0, atol=1e-4)


@each_kind
def test_v2_weights_are_alive_and_the_copies_part(tmp_path: Path, model_type: str, changes) -> None:
    _, ours = convert_v2(tmp_path, model_type, **changes)
    ours.train()
    ids = token_ids(4, 32)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        loss = ours(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            made = {n: p.grad for n, p in ours.named_parameters() if any(part in n for part in MADE_BY_V2)}
            assert len(made) >= 3 * ours.config.num_hidden_layers
            assert all(grad is not None and grad.count_nonzero() > 0.9 * grad.numel() for grad in made.values())
        optimizer.step()
    assert losses[-1] < losses[0]
    for layer in ours.model.layers:
        attention = layer.self_attn
        first, second = attention.q1_proj.weight, attention.q2_proj.weight
        assert (first - second).norm() > 1e-2 * first.norm()
        assert attention.lambda_full.lambda_proj.weight.abs().max() > 1e-3


@each_kind
def test_llama_comes_back_to_the_bit(tmp_path: Path, model_type: str, changes) -> None:
    make_llama(model_type, **changes).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", "diff_v2", tmp_path / "v2")
    convert_checkpoint(tmp_path / "v2", "llama", tmp_path / "back")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("to", ["diff_v1", "diffllama"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_v1_is_written_and_its_loss_is_told(tmp_path: Path, model_type: str, to: str) -> None:
    make_llama(model_type).save_pretrained(tmp_path / "source")
    conversion = convert_checkpoint(tmp_path / "source", to, tmp_path / "out")
    (difference,) = conversion.differences
    assert not conversion.exact and difference.max_abs_logit > difference.budget and difference.kl > 0
    model = load_model(tmp_path / "out")
    assert model.config.attention == "diff_v1"
    model.train()(input_ids=(ids := token_ids(2, 20)), labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lambda" in n)


def test_layouts_are_translated_in_a_circle(tmp_path: Path) -> None:
    make_llama("llama", rms_norm_eps=1e-5).save_pretrained(tmp_path / "source")
    steps = ["unilm", "diff_v1", "diffllama", "diff_v1", "unilm"]
    before = tmp_path / "source"
    for number, to in enumerate(steps):
        conversion = convert_checkpoint(before, to, tmp_path / f"{number}-{to}")
        assert conversion.exact == (number > 0)
        before = conversion.path
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("0-unilm", "4-unilm"))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)


def test_the_command_carries_along_what_belongs_to_a_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_llama("llama").bfloat16()
    source.generation_config.temperature, source.generation_config.do_sample = 0.6, True
    source.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "LICENSE").write_text("ours")
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6 7 8 9 " * 20)
    out = tmp_path / "deep" / "er" / "out"
    command = ["convert", str(tmp_path / "source"), "--to", "diff_v2", "--out", str(out), "--max-shard-gb", "0.00005"]
    assert cli.main([*command, "--text", str(tmp_path / "text.txt")]) == 0
    printed = capsys.readouterr().out
    assert "largest difference of a logit" in printed and "text.txt (180 tokens)" in " ".join(printed.split())
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "LICENSE").read_text() == "ours"
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.generation_config.temperature == 0.6 and again.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    written = json.loads((out / "conversion.json").read_text())
    assert written["exact"] and [d["inputs"] for d in written["differences"]] == [
        "random tokens",
        "text.txt (180 tokens)",
    ]
    assert abs(written["differences"][1]["nll_before"] - written["differences"][1]["nll_after"]) < 1e-5
    card = (out / "README.md").read_text()
    assert (
        "converted from source" in card
        and str(tmp_path) not in card
        and "query heads doubled" in card
        and "text.txt (180 tokens)" in card
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    assert cli.main(command) == 2
    assert "exists: choose another folder, or overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_result(tmp_path: Path) -> None:
    """Real processes, killed once the first part of the weights is on the disk; hundreds are to come."""
    large = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    make_llama("llama", **large).save_pretrained(tmp_path / "source")
    source = str(tmp_path / "source")
    old = tmp_path / "SIGTERM"
    old.mkdir()
    (old / "config.json").write_text("old")

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "cli.py"), "convert", source, "--to", "diff_v2"]
        options = ["--out", str(tmp_path / name), "--max-shard-gb", "0.0005", "--overwrite"]
        return subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def parts(name: str) -> list[Path]:
        return list(tmp_path.glob(f".{name}.*.partial/new/{name}/*.part"))

    expected = {"SIGTERM": 128 + signal.SIGTERM, "SIGKILL": -signal.SIGKILL}
    processes = {name: start(name) for name in expected}
    try:
        waiting = dict(processes)
        while waiting:
            for name in [name for name in waiting if parts(name)]:
                waiting.pop(name).send_signal(getattr(signal, name))
            assert all(process.poll() is None for process in waiting.values())
            time.sleep(0.002)
        assert {name: process.wait(timeout=300) for name, process in processes.items()} == expected
    finally:
        for process in processes.values():
            process.kill()
    assert (old / "config.json").read_text() == "old"
    (hidden,) = (path for path in tmp_path.iterdir() if path.name not in ("source", "SIGTERM"))
    assert hidden.match(".SIGKILL.*.partial")

    convert_checkpoint(source, "diff_v2", tmp_path / "SIGKILL")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SIGKILL", "SIGTERM", "source"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {str(i): 4 + i for i in range(10)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
