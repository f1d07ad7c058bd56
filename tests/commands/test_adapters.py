import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from difftune import cli
from difftune.checkpoints.adapters import load_adapter, load_with_base, save_adapter
from difftune.checkpoints.adapters_diffllama import BASE_PATCH, check_base_patch
from difftune.checkpoints.load import load_model
from difftune.checkpoints.merge import full_precision
from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter, lora_layers
from difftune.modeling.quantized import dequantized_weight, quantize_base
from tests.checkpoints.conftest import SIZE
from tests.checkpoints.test_adapters_diffllama import READER
from tests.conftest import ROOT
from tests.tolerances import assert_within_budget


def tokens():
    return torch.randint(102, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def train(adapted):
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    adapted.train()
    for _ in range(2):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of V1 and one of V2, each with a tokenizer, its DiffLlama twin and an adapter."""
    place = tmp_path_factory.mktemp("adapters")
    unequal = {"ranks": {"negative": 3}, "alphas": {"negative": 15, "shared": 5}, "use_rslora": True}
    for attention in ("diff_v1", "diff_v2"):
        torch.manual_seed(0)
        config = DiffTransformerConfig(**{**SIZE, "vocab_size": 102, "hidden_size": 64, "attention": attention})
        DiffTransformerForCausalLM(config).save_pretrained(place / attention)
        build_tokenizer("digits").save_pretrained(place / attention)
        settings = AdapterSettings(preset="all_linear", rank=6, alpha=9, **unequal)
        adapted = train(add_adapter(load_model(place / attention), settings))
        save_adapter(adapted, place / f"{attention}-adapter", base=str(place / attention))
    assert cli.main(["export", str(place / "diff_v1"), "--format", "diffllama", "--out", str(place / "plain")]) == 0
    return place


def refused(capsys, *arguments):
    """The one message of a command that is the user's mistake."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.removeprefix("difftune: error: ").strip()


@pytest.mark.parametrize(
    ("attention", "format", "dtype"),
    [
        ("diff_v1", None, None),
        ("diff_v2", "difftune", "bfloat16"),
        ("diff_v1", "diffllama", None),
    ],
)
def test_merge_writes_a_model_that_computes_what_base_and_adapter_do(
    folders, tmp_path, capsys, attention, format, dtype
):
    adapter = folders / f"{attention}-adapter"
    options = [*(["--format", format] if format else []), *(["--dtype", dtype] if dtype else [])]
    assert cli.main(["merge", str(adapter), "--out", str(tmp_path / "merged"), *options]) == 0
    said = capsys.readouterr().out
    assert "largest difference of a logit" in said and "merged: trainable" in said and "reloaded as" in said
    assert ("the same to the rounded weights" in said) == (dtype is not None)
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    truth = logits(load_with_base(adapter))
    allowed = 2e-5 * truth.abs().max() if dtype is None else 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (logits(merged) - truth).abs().max() <= allowed
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    weights = {t.dtype for name, t in stored.items() if "lambda" not in name}
    assert weights == {getattr(torch, dtype or "float32")}
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{adapter.name}, merged into {attention}" in card


def test_export_of_an_adapter_as_merged_is_a_merge(folders, tmp_path):
    adapter = folders / "diff_v2-adapter"
    assert cli.main(["export", str(adapter), "--format", "merged", "--out", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "modeling_difftune.py").is_file()
    torch.testing.assert_close(logits(load_model(tmp_path / "m")), logits(load_with_base(adapter)), rtol=0, atol=1e-4)


def test_export_as_peft_keeps_every_tensor_to_the_bit(folders, tmp_path):
    adapter = folders / "diff_v1-adapter"
    assert cli.main(["export", "--model", str(adapter), "--out", str(tmp_path / "again")]) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def plain(folders):
    """The adapter of V1 for plain transformers and PEFT, by the command."""
    command = ["export", str(folders / "diff_v1-adapter"), "--format", "diffllama-peft"]
    assert (
        cli.main([*command, "--base-diffllama", str(folders / "plain"), "--out", str(folders / "plain-adapter")]) == 0
    )
    return folders / "plain-adapter"


def test_the_command_s_adapter_works_without_difftune(folders, plain, tmp_path):
    torch.save(tokens(), tmp_path / "tokens.pt")
    case = {"base": folders / "plain", "adapter": plain, "tokens": tmp_path / "tokens.pt", "logits": tmp_path / "l.pt"}
    (tmp_path / "cases.json").write_text(json.dumps([{"patched": 1, **{key: str(p) for key, p in case.items()}}]))
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, "-I", str(tmp_path / "reader.py"), str(tmp_path / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    truth = logits(load_with_base(folders / "diff_v1-adapter"))
    assert (torch.load(tmp_path / "l.pt") - truth).abs().max() <= 1e-5 * max(1.0, truth.abs().max())


def test_who_forgets_the_patch_is_told(folders, plain):
    # Loaders that fetch the base by themselves would leave the patch out: they find no base.
    for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises((ValueError, OSError), match=r"apply base_patch.safetensors to it first, see README.md"):
            loader.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(folders / "plain")
    with pytest.raises(ValueError, match=r"lambda_\w+ is not what .* the base patch was not applied"):
        check_base_patch(model, plain)
    assert not model.load_state_dict(load_file(plain / BASE_PATCH), strict=False).unexpected_keys
    check_base_patch(model, plain)
    with pytest.raises(ValueError, match="no adapter for DiffLlama that difftune exported"):
        check_base_patch(model, folders / "diff_v1-adapter")


def test_wrong_sources_and_options_are_one_message(folders, tmp_path, capsys):
    v1, v2, out = folders / "diff_v1-adapter", folders / "diff_v2-adapter", tmp_path / "out"
    assert "holds no adapter (no adapter_config.json)" in refused(capsys, "merge", folders / "diff_v1", "--out", out)
    assert "does not exist" in refused(capsys, "merge", folders / "absent", "--out", out)
    assert "was trained on another base" in refused(capsys, "merge", v1, "--base", folders / "diff_v2", "--out", out)
    assert "DiffLlama knows diff_v1 only" in refused(capsys, "merge", v2, "--format", "diffllama", "--out", out)
    assert "format 'peft' is unknown: a merged" in refused(capsys, "merge", v1, "--format", "peft", "--out", out)
    assert "dtype 'float8' is unknown" in refused(capsys, "merge", v1, "--dtype", "float8", "--out", out)
    assert "merged as 'dequantized' or 'original'" in refused(capsys, "merge", v1, "--onto", "nf4", "--out", out)
    message = refused(capsys, "export", v1, "--format", "diffllama-peft", "--out", out)
    assert "is no DiffLlama" in message and f"difftune export {folders / 'diff_v1'} --format diffllama" in message
    wanted = ("export", v2, "--format", "diffllama-peft", "--base-diffllama", folders / "plain", "--out", out)
    assert "DiffLlama knows diff_v1 only" in refused(capsys, *wanted)
    assert "a format of adapters" in refused(capsys, "export", folders / "diff_v1", "--format", "peft", "--out", out)
    assert "--base is for adapters" in refused(capsys, "export", folders / "diff_v1", "--base", v1, "--out", out)
    assert "export has two sources" in refused(capsys, "export", v1, "--model", v2, "--out", out)
    assert "reads no recipe for an adapter" in refused(capsys, "export", v1, "--out", out, "seed=1")
    assert "--dtype is for a merged model" in refused(capsys, "export", v1, "--dtype", "float16", "--out", out)
    assert "belongs to the format diffllama-peft" in refused(
        capsys, "export", v1, "--base-diffllama", folders / "plain", "--out", out
    )
    assert "merge needs --out" in refused(capsys, "merge", v1)
    assert "merge needs ADAPTER" in refused(capsys, "merge", "--out", out)
    assert not out.exists()


def test_an_adapter_without_its_lambda_is_refused(folders, tmp_path, capsys):
    adapted = load_with_base(folders / "diff_v1-adapter")
    folder = save_adapter(adapted, tmp_path / "adapter", base=str(folders / "diff_v1"))
    tensors = load_file(folder / "adapter_model.safetensors")
    rest = {key: tensor for key, tensor in tensors.items() if "lambda" not in key}
    assert len(rest) == len(tensors) - 3 * 4
    save_file(rest, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, "merge", folder, "--out", tmp_path / "out")
    assert "12 missing" in message and "lambda_full" in message
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved_is_named(folders, tmp_path, capsys):
    adapted = load_with_base(folders / "diff_v1-adapter")
    folder = save_adapter(adapted, tmp_path / "adapter", base=str(tmp_path / "moved"))
    message = refused(capsys, "merge", folder, "--out", tmp_path / "out")
    assert f"{tmp_path / 'moved'} does not exist" in message and "--base DIR" in message
    base = str(folders / "diff_v1")
    assert cli.main(["merge", str(folder), "--base", base, "--out", str(tmp_path / "out")]) == 0


def test_nothing_is_replaced_unless_asked(folders, tmp_path, capsys):
    source, out = folders / "diff_v1-adapter", tmp_path / "out"
    assert cli.main(["export", str(source), "--out", str(out)]) == 0
    for command in ("export", "merge"):
        assert "exists: choose another folder" in refused(capsys, command, source, "--out", out)
    assert cli.main(["export", str(source), "--out", str(out), "--overwrite"]) == 0
    assert cli.main(["merge", str(source), "--out", str(out), "--overwrite"]) == 0
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()
    again = ["export", str(folders / "diff_v1"), "--format", "diffllama", "--out", str(out)]
    assert "exists" in refused(capsys, *again)
    assert cli.main([*again, "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def quantized(folders):
    """An adapter that was trained on the base of V2 in 4 bits, and its logits there."""
    pytest.importorskip("bitsandbytes")
    model = load_model(folders / "diff_v2", dtype=torch.bfloat16)
    quantize_base(model, "nf4", compute_dtype=torch.bfloat16)
    adapted = train(add_adapter(model, AdapterSettings(preset="attention")))
    path = folders / "quantized-adapter"
    save_adapter(adapted, path, base=str(folders / "diff_v2"))
    return path, logits(adapted)


def test_an_adapter_records_how_its_base_was_quantised_and_comes_back_to_the_bit(folders, quantized, tmp_path):
    path, trained = quantized
    record = json.loads((path / "adapter_config.json").read_text())["auto_mapping"]["difftune_base"]
    assert record["quantization"] == {"type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    assert torch.equal(logits(load_with_base(path, base_as="quantized")), trained)
    again = load_with_base(path)
    assert {p.dtype for name, p in again.named_parameters() if name.endswith("base_layer.weight")} == {torch.bfloat16}
    in_4_bits = lora_layers(load_with_base(path, base_as="quantized"), "default")
    for name, layer in lora_layers(again, "default").items():
        assert torch.equal(layer.get_base_layer().weight, dequantized_weight(in_4_bits[name].get_base_layer())), name
    # The same numbers; PEFT rounds the sums elsewhere.
    truth = logits(full_precision(again, "default"))
    assert_within_budget("dequantised", logits(again), trained, truth)
    kept = save_adapter(again, tmp_path / "kept", base=str(folders / "diff_v2"))
    assert json.loads((kept / "adapter_config.json").read_text())["auto_mapping"]["difftune_base"] == record


def test_merged_onto_the_dequantised_base_it_is_the_model_that_was_trained(quantized, tmp_path, capsys, our_log):
    path, trained = quantized
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "exact"), "--dtype", "float32"]) == 0
    assert "4-bit" not in capsys.readouterr().out
    assert cli.main(["merge", str(path), "--out", str(tmp_path / "other"), "--onto", "original"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trained on nf4 weights in bfloat16 with double quantisation and is put on plain weights" in our_log.text
    assert "this is the base before it was quantised: the logits are off by" in said
    exact, other = (logits(load_model(tmp_path / name)) for name in ("exact", "other"))
    truth = logits(full_precision(load_with_base(path), "default"))
    assert (exact - truth).abs().max() <= 2e-5 * truth.abs().max()
    # In bfloat16, as it was trained, the model is as far from the truth as bfloat16 is; the original base is further.
    assert (other - truth).abs().max() > 4 * (trained.float() - truth).abs().max()


def test_an_adapter_of_plain_weights_says_when_it_is_put_on_others(folders, our_log):
    pytest.importorskip("bitsandbytes")
    model = load_model(folders / "diff_v1")
    quantize_base(model, "nf4", compute_dtype=torch.float32)
    load_adapter(model, folders / "diff_v1-adapter")
    assert "was trained on plain weights and is put on nf4 weights in float32" in our_log.text


def test_every_documented_command_runs(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "diff_v1", "my-model")
    save_adapter(load_with_base(folders / "diff_v1-adapter"), "adapters/maths", base="my-model")
    text = (ROOT / "docs" / "how-to" / "adapters.md").read_text()
    commands = re.findall(r"^difftune .*$|(?<=`)difftune (?:export|merge) [^`]+(?=`)", text, flags=re.MULTILINE)
    # Those of a run are tried where runs are, in tests/recipes and tests/integration.
    commands = [command for command in commands if "quickstart_lora" not in command]
    formats = {shlex.split(c)[shlex.split(c).index("--format") + 1] for c in commands if "--format" in c}
    assert formats == {"peft", "merged", "difftune", "diffllama", "diffllama-peft"} and len(commands) >= 9
    if importlib.util.find_spec("bitsandbytes") is None:
        commands = [command for command in commands if "nf4" not in command]
    else:
        model = load_model("my-model")
        quantize_base(model, "nf4", compute_dtype=torch.float32)
        save_adapter(train(add_adapter(model, AdapterSettings(preset="attention"))), "adapters/maths-nf4")
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err}"
    for name in ("my-maths", "maths-merged", "my-model-hub"):
        assert (Path(name) / "modeling_difftune.py").is_file(), name
    assert (Path("maths-diffllama-peft") / BASE_PATCH).is_file()
