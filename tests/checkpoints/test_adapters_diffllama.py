import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import DiffLlamaForCausalLM

from difftune.checkpoints import adapters_diffllama
from difftune.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from difftune.checkpoints.adapters_diffllama import BASE_PATCH, export_adapter_diffllama
from difftune.checkpoints.export import export_model
from difftune.modeling import cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from tests.checkpoints.test_adapters import logits, tokens, train

UNEQUAL = AdapterSettings(
    preset="all_linear", rank=6, alpha=9, ranks={"negative": 3}, alphas={"negative": 15, "shared": 5}
)
CASES = {
    "mha": (UNEQUAL, {"num_key_value_heads": 8}),
    "gqa": (UNEQUAL, {}),
    "rslora, bias on three projections": (
        AdapterSettings(**{**vars(UNEQUAL), "use_rslora": True}),
        {"attention_bias": True},
    ),
    "dora": (AdapterSettings(**{**vars(UNEQUAL), "use_dora": True}), {}),
    "dora on one of the pair": (AdapterSettings(targets=["q2_proj", "k1_proj", "o_proj"], use_dora=True), {}),
    "negative branch": (AdapterSettings(preset="negative_branch"), {}),
    "norms, the folded one too": (AdapterSettings(preset="attention", train_norms=True), {}),
    "embeddings": (AdapterSettings(preset="attention", train_embeddings=True), {"tie_word_embeddings": True}),
    "plain norm, lambda left alone": (AdapterSettings(preset="attention", train_lambda=False), {"subln": "plain"}),
}


def exported(make_model, tmp_path, settings, changes, **options):
    model = make_model(**changes)
    export_model(model, None, tmp_path / "base", format="diffllama")
    adapted = train(add_adapter(model, settings))
    return adapted, export_adapter_diffllama(adapted, tmp_path / "adapter", base=tmp_path / "base", **options)


READER = """
import json, sys
sys.modules["difftune"] = None  # importing it is an error
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from peft import PeftModel

for case in json.load(open(sys.argv[1])):
    model = AutoModelForCausalLM.from_pretrained(case["base"])
    if case["patched"]:
        patch = load_file(case["adapter"] + "/base_patch.safetensors")
        assert not model.load_state_dict(patch, strict=False).unexpected_keys
    model = PeftModel.from_pretrained(model, case["adapter"]).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(case["tokens"])).logits, case["logits"])
    assert type(model.get_base_model()).__module__.startswith("transformers.")
assert not [name for name in sys.modules if name.startswith("difftune.")]
"""


def test_plain_transformers_and_peft_compute_the_same_without_difftune(make_model, tmp_path):
    cases, expected = [], {}
    torch.save(tokens(), tmp_path / "tokens.pt")
    for i, (name, (settings, changes)) in enumerate(CASES.items()):
        folder = tmp_path / str(i)
        adapted, report = exported(make_model, folder, settings, changes, verify=False)
        expected[name] = logits(adapted)
        paths = {
            "base": folder / "base",
            "adapter": folder / "adapter",
            "tokens": tmp_path / "tokens.pt",
            "logits": folder / "logits.pt",
        }
        cases.append({"patched": report.patched, **{key: str(path) for key, path in paths.items()}})
        card = (folder / "adapter" / "README.md").read_text()
        for line in ("patch = load_file(", "load_state_dict(patch, strict=False)", "Without the base patch"):
            assert (line in card) == bool(report.patched)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, "-I", str(tmp_path / "reader.py"), str(tmp_path / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    for case, (name, wanted) in zip(cases, expected.items(), strict=True):
        difference = (torch.load(case["logits"]) - wanted).abs().max().item()
        assert difference <= 1e-5 * max(1.0, wanted.abs().max().item()), f"{name}: {difference}"


def test_ranks_add_up_and_the_scaling_is_one(make_model, tmp_path):
    _, report = exported(make_model, tmp_path, UNEQUAL, {})
    config = json.loads((report.path / ADAPTER_CONFIG).read_text())
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert config["rank_pattern"] == {"q_proj": 9, "k_proj": 9} | dict.fromkeys(("v_proj", "o_proj", *mlp), 6)
    assert config["alpha_pattern"] == config["rank_pattern"] and not config["use_rslora"]
    tensors = load_file(report.path / ADAPTER_WEIGHTS)
    stem = "base_model.model.model.layers.0.self_attn.q_proj."
    assert tensors[stem + "lora_A.weight"].shape == (9, 48)
    block = tensors[stem + "lora_B.weight"]
    assert block.shape == (80, 9)
    assert not block[:40, 6:].any() and not block[40:, :6].any() and block[:40, :6].any() and block[40:, 6:].any()


def test_report_tells_what_forgetting_the_patch_costs(make_model, tmp_path):
    adapted, report = exported(make_model, tmp_path, UNEQUAL, {})
    assert report.patched == 3 * 4  # the vectors of lambda, and nothing else
    assert all(".self_attn.lambda_" in name for name in load_file(report.path / BASE_PATCH))
    assert report.max_abs_difference is not None and report.budget is not None and report.without_patch is not None
    assert report.max_abs_difference < report.budget < 1e-2 < report.without_patch
    assert f"without it the logits are off by {report.without_patch:.2e}" in str(report)
    forgotten = PeftModel.from_pretrained(DiffLlamaForCausalLM.from_pretrained(tmp_path / "base"), report.path).eval()
    off = (logits(forgotten) - logits(adapted)).abs().max().item()
    assert off > 1e-2


def test_lora_alone_needs_nothing_else(make_model, tmp_path):
    _, report = exported(make_model, tmp_path, AdapterSettings(train_lambda=False), {})
    assert report.patched == 0 and report.without_patch is None
    assert not (report.path / BASE_PATCH).exists()
    assert "patch" not in str(report) and "patch" not in (report.path / "README.md").read_text()


def test_another_base_is_found_and_nothing_is_left(make_model, tmp_path):
    adapted = train(add_adapter(make_model(), UNEQUAL))
    export_model(make_model(), None, tmp_path / "other", format="diffllama")
    with pytest.raises(ValueError, match=r"Is .*other the export of the base that it was trained on"):
        export_adapter_diffllama(adapted, tmp_path / "adapter", base=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_plain_peft_cannot_have_is_refused(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "ours")
    export_model(model, None, tmp_path / "base", format="diffllama")
    adapted = add_adapter(model, AdapterSettings(preset="lambda_only"))
    with pytest.raises(ValueError, match="has no LoRA for PEFT to load: merge it"):
        export_adapter_diffllama(adapted, tmp_path / "adapter", base=tmp_path / "base")
    with pytest.raises(ValueError, match="model_type 'difftune': export the base with format='diffllama'"):
        export_adapter_diffllama(adapted, tmp_path / "adapter", base=tmp_path / "ours")
    second = add_adapter(make_model(attention="diff_v2"), AdapterSettings())
    with pytest.raises(ValueError, match="DiffLlama knows diff_v1 only"):
        export_adapter_diffllama(second, tmp_path / "adapter", base=tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


def test_an_exported_adapter_is_not_mistaken_for_one_of_ours(make_model, tmp_path):
    _, report = exported(make_model, tmp_path, UNEQUAL, {})
    with pytest.raises(ValueError, match="for plain transformers' DiffLlama: use the adapter that it was made of"):
        load_adapter(make_model(), report.path)


def test_a_wrong_layout_is_found(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters_diffllama, "groups_to_halves", lambda rows, groups: rows)
    with pytest.raises(ValueError, match=r"in plain transformers, on .* the logits differ"):
        exported(make_model, tmp_path, UNEQUAL, {})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_bfloat16_base_is_served_too(make_model, tmp_path):
    model = cast_weights(make_model(), torch.bfloat16)
    adapted, report = exported(lambda: model, tmp_path, UNEQUAL, {})
    assert report.max_abs_difference is not None and report.max_abs_difference < 2e-5
    assert adapted.get_base_model().dtype == torch.bfloat16
