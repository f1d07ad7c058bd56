import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file

from difftune.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_record,
    describe_config,
    load_adapter,
    load_with_base,
    save_adapter,
)
from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import activate_adapter, add_adapter, trained_parameters
from difftune.modeling.lambdas import warming_up
from difftune.training.checkpoint_io import AtomicCheckpointIO

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "lambda_only": AdapterSettings(preset="lambda_only"),
    "unequal": AdapterSettings(preset="all_linear", ranks={"negative": 3, "shared": 5}, alphas={"negative": 9}),
    "rslora": AdapterSettings(preset="negative_branch", use_rslora=True, train_norms=True),
    "dora": AdapterSettings(targets=["q1_proj", "q2_proj", "v_proj"], use_dora=True, train_lambda=False),
    "embeddings": AdapterSettings(preset="attention", train_embeddings=True),
}


def tokens():
    return torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def train(adapted, steps=2):
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    adapted.train()
    for _ in range(steps):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.fixture
def base(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "changes", [{}, {"attention": "diff_v2"}, {"tie_word_embeddings": True}], ids=["v1", "v2", "tied"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_and_loaded_adapter_computes_the_same_to_the_bit(make_model, tmp_path, settings, changes, dtype):
    make_model(**changes).save_pretrained(tmp_path / "base")
    adapted = train(add_adapter(load_model(tmp_path / "base", dtype=dtype), settings))
    before, saved = logits(adapted), trained_parameters(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    again = load_with_base(tmp_path / "adapter", dtype=dtype)
    assert torch.equal(logits(again), before)
    loaded = trained_parameters(again)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(p, saved[key]) and p.dtype == saved[key].dtype for key, p in loaded.items())
    assert not any(p.requires_grad for p in again.parameters())
    # And PEFT alone reads it, without a word.
    model = load_model(tmp_path / "base", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    if dtype == torch.float32 or not settings.train_norms:  # PEFT rounds norms to the dtype of the base
        assert torch.equal(logits(peft), before)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_lambda_in_the_file_is_the_trained_lambda_to_the_bit(make_model, tmp_path, attention):
    model = cast_weights(make_model(attention=attention), torch.bfloat16)
    start = {name: p.clone() for name, p in model.named_parameters() if "lambda_full" in name}
    adapted = train(add_adapter(model, AdapterSettings(preset="negative_branch")))
    save_adapter(adapted, tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    attentions = [layer.self_attn for layer in model.model.layers]
    for i, module in enumerate(attentions):
        for name, parameter in module.lambda_full.modules_to_save["default"].named_parameters():
            own = f"model.layers.{i}.self_attn.lambda_full.{name}"
            assert torch.equal(file["base_model.model." + own], parameter)
            assert not torch.equal(parameter, start[own]) and parameter.dtype == torch.float32
    assert not any("base_layer" in key or "embed" in key or "norm" in key for key in file)


def test_auto_peft_finds_the_base_by_itself(base, tmp_path):
    adapted = train(add_adapter(load_model(base), AdapterSettings()))
    save_adapter(adapted, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base)
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["difftune.modeling.modeling"]).eval()
    assert torch.equal(logits(again), logits(adapted))
    assert torch.equal(again.generate(tokens(), max_new_tokens=5), adapted.generate(tokens(), max_new_tokens=5))


def test_an_adapter_that_peft_saved_is_read(base, tmp_path):
    adapted = train(add_adapter(load_model(base), SETTINGS["unequal"]))
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_model(base), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(adapted))


def test_training_of_a_loaded_adapter_goes_on_as_if_it_had_not_stopped(base, tmp_path):
    straight = train(train(add_adapter(load_model(base), SETTINGS["unequal"])))
    torch.manual_seed(0)
    first = train(add_adapter(load_model(base), SETTINGS["unequal"]))
    del straight
    save_adapter(first, tmp_path / "first")
    again = load_with_base(tmp_path / "first", trainable=True)
    assert {id(p) for p in again.parameters() if p.requires_grad} == {id(p) for p in trained_parameters(again).values()}
    train(first)
    train(again)
    assert torch.equal(logits(again), logits(first))


def test_several_adapters_are_loaded_onto_one_base_and_switched(base, tmp_path):
    expected = {}
    for name, settings in (("maths", SETTINGS["unequal"]), ("code", SETTINGS["rslora"])):
        adapted = train(add_adapter(load_model(base), settings))
        save_adapter(adapted, tmp_path / name)
        expected[name] = logits(adapted)
    model = load_adapter(load_model(base), tmp_path / "maths", "maths")
    load_adapter(model, tmp_path / "code", "code", trainable=True)
    model.eval()
    assert torch.equal(logits(model), expected["code"])
    activate_adapter(model, "maths")
    assert torch.equal(logits(model), expected["maths"])
    save_adapter(model, tmp_path / "again", "code")
    names = [load_file(tmp_path / folder / ADAPTER_WEIGHTS) for folder in ("code", "again")]
    assert all(torch.equal(tensor, names[1][key]) for key, tensor in names[0].items())


def test_missing_extra_and_misshapen_tensors_are_named_and_the_model_stays_whole(base, tmp_path):
    save_adapter(add_adapter(load_model(base), AdapterSettings()), tmp_path / "adapter")
    path = tmp_path / "adapter" / ADAPTER_WEIGHTS
    good = load_file(path)
    lost = "base_model.model.model.layers.1.self_attn.lambda_full.lambda_k2"
    model = load_model(base)
    save_file({key: tensor for key, tensor in good.items() if key != lost}, path)
    with pytest.raises(ValueError, match=f"1 missing .{lost}"):
        load_adapter(model, tmp_path / "adapter")
    save_file({**good, "base_model.model.model.norm.weight": torch.ones(48)}, path)
    with pytest.raises(ValueError, match=r"1 extra .base_model.model.model.norm.weight"):
        load_adapter(model, tmp_path / "adapter")
    save_file({**good, lost: torch.ones(3)}, path)
    with pytest.raises(ValueError, match=rf"lambda_k2 in .* is \(3,\), {ADAPTER_CONFIG} makes it \(10,\)"):
        load_adapter(model, tmp_path / "adapter")
    assert type(model) is DiffTransformerForCausalLM
    assert not any("lora" in name or "modules_to_save" in name for name, _ in model.named_parameters())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_adapter(model, tmp_path / "adapter")
    path.unlink()
    with pytest.raises(ValueError, match=f"has no {ADAPTER_WEIGHTS}: the adapter is incomplete"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "diff_v2"}, "attention is 'diff_v2' here and 'diff_v1' there"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4 here and 3 there"),
        ({"lambda_init": 0.5}, "lambda_init is 0.5 here and None there"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is"),
        ({}, "the architecture is the same, the weights are not"),
    ],
)
def test_another_base_is_refused_by_what_differs(make_model, base, tmp_path, changes, message):
    save_adapter(add_adapter(load_model(base), AdapterSettings()), tmp_path / "adapter")
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(make_model(**changes), tmp_path / "adapter")
    assert f"({base})" in str(caught.value)


def test_a_base_with_one_changed_projection_is_another_base(base, tmp_path):
    save_adapter(add_adapter(load_model(base), AdapterSettings()), tmp_path / "adapter")
    model = load_model(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] *= 1.1
    with pytest.raises(ValueError, match="the weights are not"):
        load_adapter(model, tmp_path / "adapter")


def test_the_record_of_a_base_does_not_depend_on_dtype_backend_or_adapters(base):
    record = base_record(load_model(base))
    assert record["weights"] and record["projections"]
    assert base_record(load_model(base, dtype=torch.bfloat16, attention_backend="reference")) == record
    adapted = train(add_adapter(load_model(base), AdapterSettings(train_norms=True, train_embeddings=True)))
    assert base_record(adapted) == record
    half = base_record(load_model(base, dtype=torch.float16))
    assert half == {**record, "weights": None, "projections": None}


def test_large_tensors_are_sampled_in_every_dtype(make_model):
    model = make_model(vocab_size=500)  # more rows than are sampled
    record = base_record(model)
    assert base_record(cast_weights(model, torch.bfloat16)) == record
    with torch.no_grad():
        model.model.embed_tokens.weight[::2].mul_(2)
    assert base_record(model)["weights"] != record["weights"]


def test_nothing_is_written_over_or_half(base, tmp_path):
    adapted = add_adapter(load_model(base), AdapterSettings())
    save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(ValueError, match="exists"):
        save_adapter(adapted, tmp_path / "adapter")
    with torch.no_grad():
        next(iter(trained_parameters(adapted).values())).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"'default' is not saved: .* are not finite"):
        save_adapter(adapted, tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "type 'IA3': only LORA is read"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj"]}, "does not fit a diff_v1 model: No modules were targeted"),
        ({"target_modules": ["q2_proj"]}, "extra"),
    ],
)
def test_other_kinds_of_adapters_are_refused(base, tmp_path, change, message):
    save_adapter(add_adapter(load_model(base), AdapterSettings()), tmp_path / "adapter")
    path = tmp_path / "adapter" / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(base), tmp_path / "adapter")


def test_a_folder_without_an_adapter_is_refused(base):
    with pytest.raises(ValueError, match=f"holds no adapter .no {ADAPTER_CONFIG}"):
        load_adapter(load_model(base), base)


def test_an_adapter_that_names_no_base_asks_for_one(make_model, tmp_path):
    model = make_model()
    save_adapter(add_adapter(model, AdapterSettings()), tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not say what its base model is: name it"):
        load_with_base(tmp_path / "adapter")


def test_a_training_checkpoint_with_trainables_only_is_read_as_an_adapter(base, tmp_path):
    adapted = train(add_adapter(load_model(base), AdapterSettings()))
    model = adapted.get_base_model()
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    folder: Path = tmp_path / "step-00000002"
    AtomicCheckpointIO().save_checkpoint({"global_step": 2, "state_dict": state}, folder)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(describe_config(adapted)))
    again = load_with_base(folder)
    assert torch.equal(logits(again), logits(adapted))
    small, whole = (folder / "checkpoint.pt").stat().st_size, (base / "model.safetensors").stat().st_size
    assert small < whole


def test_the_commands_of_the_documentation_run_in_their_order(make_model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("my-model")
    save_adapter(train(add_adapter(load_model("my-model"), SETTINGS["unequal"])), "adapters/code", base="my-model")
    text = (ROOT / "docs" / "how-to" / "adapters.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for block in blocks if "trust_remote_code" not in block]  # run by the test of the commands
    assert len(blocks) == 7
    names = {"tokenizer": tokenizer}
    for i, block in enumerate(blocks):
        if "quantize_base" in block:
            assert type(names["model"].get_base_model()).__name__ == "DiffLlamaForCausalLM"
            pytest.importorskip("bitsandbytes")
        exec(block, names)
        if i == 0:
            train(names["adapted"])
    said = capsys.readouterr().out
    assert "trainable" in said and "merged: logits differ by at most" in said and "PEFT does not apply" in said
    assert "projections in 4 bits" in said


def test_an_adapter_in_a_warm_up_of_lambda_is_saved_with_its_step(make_model, tmp_path):
    make_model(lambda_warmup_steps=9).save_pretrained(tmp_path / "base")
    adapted = train(add_adapter(load_model(tmp_path / "base"), AdapterSettings()))
    for module in warming_up(adapted):
        module.advance()
        module.advance()
    save_adapter(adapted, tmp_path / "adapter")
    again = load_with_base(tmp_path / "adapter", trainable=True)
    assert torch.equal(logits(again), logits(adapted))
    assert [int(module.get_buffer("warmup_step")) for module in warming_up(again)] == [2] * 3
    with_peft = PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(with_peft), logits(adapted))
    # Another base: the same weights without a warm-up.
    make_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="lambda_warmup_steps is 0 here and 9 there"):
        load_adapter(load_model(tmp_path / "other"), tmp_path / "adapter")
