"""Runs that train an adapter: what they write, how they go on, what reads it; on a base made here."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from difftune.builder import build_adapter, build_data, build_model, build_module, build_tokenizer
from difftune.checkpoints.adapters import load_with_base
from difftune.checkpoints.load import load_model
from difftune.cli import main
from difftune.commands import run
from difftune.config import load_config
from difftune.data.tokenizers import build_tokenizer as build_named_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, count_parameters
from tests.conftest import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SHORT = (
    "trainer.max_steps=3",
    "optim.warmup_steps=1",
    "optim.lambda_lr=0.02",
    "data.train.*.options.count=200",
    "evaluation.tasks.*.limit=4",
    "evaluation.max_new_tokens=6",
    "evaluation.every_fraction=null",
    "logging.loggers=[jsonl]",
    "logging.progress_bar=false",
    "checkpoint.every_n_steps=2",
)
# Unequal branches and dropout: what is lost on the way shows.
ADAPTER = "adapter={preset: attention, rank: 4, ranks: {negative: 2}, dropout: 0.2, train_norms: true}"


def make_base(folder, **changes):
    torch.manual_seed(5)
    tokenizer = build_named_tokenizer("digits")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = DiffTransformerConfig(**{"vocab_size": len(tokenizer), **shape, **special, **changes})
    DiffTransformerForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(base, run_dir, *overrides, command="fit"):
    fixed = (f"model.path={base}", "tokenizer=null", f"run_dir={run_dir}", ADAPTER)
    return load_config(QUICKSTART, [*SHORT, *fixed, *overrides], command=command)


def last(run_dir, stage="traces"):
    return run_dir / "checkpoints" / stage / "step-00000003"


def saved(checkpoint):
    return torch.load(checkpoint / "checkpoint.pt", weights_only=True)


def assert_same_state(ours, theirs):
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(tensor, theirs["state_dict"][name]) for name, tensor in ours["state_dict"].items())
    moments, others = (state["optimizer_states"][0]["state"] for state in (ours, theirs))
    assert moments.keys() == others.keys() and moments
    for index, entries in moments.items():
        assert all(torch.equal(value, others[index][name]) for name, value in entries.items())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("adapter-run") / "run"
    assert run.fit(config_of(base, run_dir)) == 0
    return run_dir


def test_a_checkpoint_holds_what_is_trained_and_says_which_base_it_belongs_to(finished, base):
    state = saved(last(finished))
    assert all("lora_" in name or ".modules_to_save.default." in name for name in state["state_dict"])
    lambdas = [name for name in state["state_dict"] if "lambda_full" in name]
    assert len(lambdas) == 2 * 4
    files = {path.name for path in last(finished).iterdir()}
    assert files == {"checkpoint.pt", "adapter_config.json", "manifest.json"}
    manifest = json.loads((last(finished) / "manifest.json").read_text())
    assert manifest["files"].keys() == {"checkpoint.pt", "adapter_config.json"}
    config = json.loads((last(finished) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["rank_pattern"] == {"q2_proj": 2, "k2_proj": 2} and config["lora_dropout"] == 0.2


def test_every_trained_part_moves_and_the_base_does_not(finished, base):
    first, second = (saved(last(finished, stage))["state_dict"] for stage in ("answers", "traces"))
    assert not [name for name in first if torch.equal(first[name], second[name])]
    adapted = load_with_base(last(finished))
    plain = load_model(base).state_dict()
    inside = adapted.get_base_model().state_dict()
    frozen = {name: tensor for name, tensor in inside.items() if "base_layer" in name or "original_module" in name}
    assert frozen
    for name, tensor in frozen.items():
        assert torch.equal(tensor, plain[name.replace(".base_layer", "").replace(".original_module", "")])


def test_lambda_is_trained_at_its_own_rate_without_decay(finished):
    groups = {group["name"]: group for group in saved(last(finished))["optimizer_states"][0]["param_groups"]}
    assert groups["lambda"]["initial_lr"] == 0.02 and groups["decay"]["initial_lr"] == 3e-3
    assert groups["lambda"]["weight_decay"] == 0 and len(groups["lambda"]["params"]) == 8


def test_lambda_of_the_adapter_is_what_is_monitored(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = {line["name"]: line["value"] for line in lines if line["stage"] == "traces" and line["step"] == 3}
    # As of the forward of the last step, whose checkpoint comes after the update: near, and not the base's.
    for i in range(2):
        trained = load_model(last(finished)).model.layers[i].self_attn.lambda_full().item()
        assert logged[f"lambda/layer_{i:02d}"] == pytest.approx(trained, abs=0.05)
    assert {f"lambda/layer_{i:02d}" for i in range(3)} & logged.keys() == {"lambda/layer_00", "lambda/layer_01"}


def test_the_export_is_peft_s_folder_with_the_trained_lambda_to_the_bit(finished):
    files = {path.name for path in (finished / "export").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    } <= files and "config.json" not in files
    exported, state = load_file(finished / "export" / "adapter_model.safetensors"), saved(last(finished))["state_dict"]
    assert len(exported) == len(state)
    for i in range(2):
        own = f"model.layers.{i}.self_attn.lambda_full"
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            trained = state[f"model.{own}.modules_to_save.default.{name}"]
            assert torch.equal(exported[f"base_model.model.{own}.{name}"], trained)


@pytest.mark.parametrize("where", ["export", "checkpoints/traces/step-00000003"])
def test_an_adapter_is_evaluated_and_generates_merged_into_its_base(finished, where, capsys):
    folder = finished / where
    overrides = [*(o for o in SHORT if "data" not in o), f"model.path={folder}", "tokenizer=null"]
    results = run.evaluate(load_config(QUICKSTART, overrides, command="evaluate"))
    assert results["arithmetic"]["n"] == 4
    assert main(["generate", "--model", str(folder), "--prompt", "1+2", "--max-new-tokens", "4"]) == 0
    merged, adapted = load_model(folder), load_with_base(folder)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == load_model(adapted.get_base_model().config._name_or_path).state_dict().keys()


def test_a_merged_adapter_in_bfloat16_is_the_one_in_float32_rounded(finished):
    exact, rounded = load_model(finished / "export"), load_model(finished / "export", dtype=torch.bfloat16)
    for (name, weight), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(other, weight if "lambda_full" in name else weight.bfloat16()), name


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(finished, tmp_path):
    shutil.copytree(finished / "export", tmp_path / "bare", ignore=shutil.ignore_patterns("tok*", "*.jinja"))
    config = load_config(None, [f"model.path={tmp_path / 'bare'}"], command="generate")
    assert len(build_tokenizer(config)) == len(build_named_tokenizer("digits"))


@pytest.mark.parametrize("keep", ["half of a stage", "one stage of two"])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(finished, base, tmp_path, keep):
    stopped = tmp_path / "stopped"
    shutil.copytree(finished, stopped)
    shutil.rmtree(stopped / "export")
    if keep == "half of a stage":
        shutil.rmtree(last(stopped))
        (stopped / "checkpoints" / "traces" / "done.json").unlink()
    else:
        shutil.rmtree(stopped / "checkpoints" / "traces")
    assert run.fit(config_of(base, stopped)) == 0
    assert_same_state(saved(last(stopped)), saved(last(finished)))
    exports = [load_file(folder / "export" / "adapter_model.safetensors") for folder in (finished, stopped)]
    assert all(torch.equal(tensor, exports[1][name]) for name, tensor in exports[0].items())


def test_the_warm_up_of_its_lambda_goes_on_with_the_adapter(tmp_path):
    base = make_base(tmp_path / "base", lambda_warmup_steps=20)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run.fit(config_of(base, whole)) == 0
    steps = [tensor for name, tensor in saved(last(whole))["state_dict"].items() if name.endswith("warmup_step")]
    assert len(steps) == 2 and all(step == 6 for step in steps)
    shutil.copytree(whole, stopped)
    shutil.rmtree(last(stopped))
    (stopped / "checkpoints" / "traces" / "done.json").unlink()
    assert run.fit(config_of(base, stopped)) == 0
    assert_same_state(saved(last(stopped)), saved(last(whole)))
    written = load_file(stopped / "export" / "adapter_model.safetensors")
    assert [tensor.item() for name, tensor in written.items() if name.endswith("warmup_step")] == [6, 6]


def test_a_base_in_4_bits_trains_resumes_and_is_merged_as_it_was_trained(base, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run.fit(config_of(base, whole, "model.quantization=nf4")) == 0
    state = saved(last(whole))["state_dict"]
    assert all("lora_" in name or ".modules_to_save.default." in name for name in state)
    shutil.copytree(whole, stopped)
    shutil.rmtree(last(stopped))
    (stopped / "checkpoints" / "traces" / "done.json").unlink()
    assert run.fit(config_of(base, stopped, "model.quantization=nf4")) == 0
    assert_same_state(saved(last(stopped)), saved(last(whole)))
    # What is loaded has the numbers that the 4 bits stand for.
    loaded, original = load_model(whole / "export").state_dict(), load_model(base).state_dict()
    frozen = [name for name in original if name.endswith("mlp.up_proj.weight")]
    assert frozen and not any(torch.equal(loaded[name], original[name]) for name in frozen)
    assert all((loaded[name] - original[name]).norm() < 0.2 * original[name].norm() for name in frozen)
    assert main(["merge", str(whole / "export"), "--out", str(tmp_path / "merged")]) == 0
    merged = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in merged.items())
    # Another run_dir with plain weights does not go on from it.
    with pytest.raises(ValueError, match="base"):
        run.fit(config_of(base, stopped, "trainer.max_steps=4"))


def test_the_checkpoint_of_an_adapter_is_a_small_share_of_the_whole_one(tmp_path):
    """Both are weights and two moments of what is trained; at rank 1 that is little of a wide model."""
    base = make_base(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    sizes, counts = {}, {}
    for name, adapter in (("whole", "null"), ("adapter", "{preset: negative_branch, rank: 1}")):
        fixed = (f"model.path={base}", "tokenizer=null", f"run_dir={tmp_path / name}", f"adapter={adapter}")
        assert run.fit(load_config(QUICKSTART, [*SHORT, *fixed, "evaluation.tasks=[]", "export=null"])) == 0
        sizes[name] = sum(file.stat().st_size for file in last(tmp_path / name).iterdir())
        counts[name] = sum(tensor.numel() for tensor in saved(last(tmp_path / name))["state_dict"].values())
    assert counts["adapter"] < 0.01 * counts["whole"]
    # A tied head stands twice in the names and once in the file.
    assert sizes["adapter"] < 0.05 * sizes["whole"]


def test_another_adapter_or_base_does_not_go_on_in_the_same_folder(finished, base, tmp_path):
    with pytest.raises(ValueError, match="holds a run with adapter="):
        run.fit(config_of(base, finished, "adapter.rank=8"))
    with pytest.raises(ValueError, match="holds a run with adapter="):
        run.fit(config_of(base, finished, "adapter=null"))
    stopped, moved = tmp_path / "stopped", tmp_path / "base"
    shutil.copytree(finished, stopped)
    shutil.rmtree(stopped / "checkpoints" / "traces")
    # The folder of the base is the same, what is in it is not.
    shutil.copytree(base, moved)
    model = load_model(moved)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(moved)
    (stopped / "config.yaml").write_text((stopped / "config.yaml").read_text().replace(str(base), str(moved)))
    with pytest.raises(ValueError, match=r"trained on another base.*the weights are not"):
        run.fit(config_of(moved, stopped))


@pytest.mark.parametrize(("form", "loads"), [("difftune", "difftune"), ("diffllama", "diffllama")])
def test_a_merged_export_is_written_when_asked_for(base, tmp_path, form, loads):
    run_dir = tmp_path / "run"
    assert run.fit(config_of(base, run_dir, f"export.format={form}", "trainer.max_steps=2", "evaluation.tasks=[]")) == 0
    assert json.loads((run_dir / "export" / "config.json").read_text())["model_type"] == loads
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        trained = load_with_base(run_dir / "checkpoints" / "traces" / "step-00000002")(ids).logits
        torch.testing.assert_close(load_model(run_dir / "export")(ids).logits, trained, rtol=0, atol=1e-5)


def test_a_context_extended_for_the_training_comes_with_the_adapter(base, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    longer = ("model.max_position_embeddings=8192", f"model.rope_parameters={rope}")
    config = config_of(base, tmp_path / "run", *longer, "trainer.max_steps=2", "evaluation.tasks=[]")
    assert run.fit(config) == 0
    for path in ("export", "checkpoints/traces/step-00000002"):
        model = load_model(tmp_path / "run" / path)
        assert model.config.max_position_embeddings == 8192
        assert model.config.rope_parameters["rope_theta"] == 500000.0
        assert not torch.equal(model.model.rotary_emb.inv_freq, load_model(base).model.rotary_emb.inv_freq)


def test_an_adapter_is_trained_on_an_adapter(finished, tmp_path):
    config = config_of(finished / "export", tmp_path / "run", "trainer.max_steps=2", "evaluation.tasks=[]")
    assert run.fit(config) == 0
    twice, once = load_model(tmp_path / "run" / "export").state_dict(), load_model(finished / "export").state_dict()
    assert twice.keys() == once.keys()
    weight = "model.layers.0.self_attn.q1_proj.weight"
    assert not torch.equal(twice[weight], once[weight])
    # In bfloat16, too, the base of the second is the first, merged.
    config = config_of(finished / "export", tmp_path / "half", "model.dtype=bfloat16", "trainer.max_steps=2")
    config.evaluation.tasks = []
    assert run.fit(config) == 0
    assert load_model(tmp_path / "half" / "export").dtype == torch.float32


def test_gradient_checkpointing_trains_the_adapter_alike(base, tmp_path):
    losses = []
    for value in ("false", "true"):
        run_dir = tmp_path / value
        config = config_of(base, run_dir, f"model.gradient_checkpointing={value}", "evaluation.tasks=[]", "export=null")
        assert run.fit(config) == 0
        losses.append(saved(last(run_dir))["state_dict"])
    for name, tensor in losses[0].items():
        torch.testing.assert_close(losses[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_parameters_under_an_adapter_count_once(base):
    config = load_config(QUICKSTART, [f"model.path={base}", "tokenizer=null", "adapter={preset: lambda_only}"])
    tokenizer = build_tokenizer(config)
    model = build_model(config.model, tokenizer, 0)
    before = count_parameters(model)
    assert build_adapter(config, model) is not None
    assert count_parameters(model) == {**before, "trainable": before["lambda"]}


def test_the_seed_decides_the_start_of_an_adapter(base):
    config = config_of(base, "unused")
    tokenizer = build_tokenizer(config)
    starts = []
    for seed in (1, 1, 2):
        config.seed = seed
        model = build_model(config.model, tokenizer, 0)
        build_adapter(config, model)
        starts.append(model.model.layers[0].self_attn.q1_proj.lora_A["default"].weight)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_without_an_adapter_the_module_knows_of_none(base):
    config = config_of(base, "unused", "adapter=null")
    tokenizer = build_tokenizer(config)
    model = build_model(config.model, tokenizer, 0)
    assert build_adapter(config, model) is None
    stage = config.resolved_stages()[0]
    module = build_module(stage, model, build_data(stage, tokenizer, None), tokenizer)
    assert module.adapter_config is None and module.strict_loading


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter={targets: [q3_proj]}", "did you mean 'q2_proj'?"),
        ("adapter={preset: atention}", "did you mean 'attention'?"),
        ("adapter={rank: 0}", "adapter.rank must be at least 1, got 0"),
        ("adapter={alpha: 0}", "adapter.alpha must be greater than 0"),
        ("adapter={ranks: {negative: 0}}", "adapter.ranks has negative: 0, which must be at least 1, got 0"),
        ("adapter={alphas: {shared: 0}}", "must be greater than 0, got 0"),
        ("adapter={ranks: {negativ: 2}}", "did you mean 'negative'?"),
        ("adapter={preset: lambda_only, train_lambda: false}", "would train nothing"),
        ("adapter={preset: attention, targets: [q1_proj]}", "exclude one another"),
        ("adapter={rnk: 3}", "did you mean 'adapter.rank'?"),
        ("stages.traces.adapter={rank: 3}", "did you mean 'adapter'?"),
        ("model.path=null", "adapter: needs a base that is on disk"),
    ],
)
def test_a_mistake_is_one_clear_error(base, tmp_path, capsys, override, message):
    fixed = [f"model.path={base}", "tokenizer=digits", f"run_dir={tmp_path / 'run'}", "adapter={rank: 2}"]
    assert main(["fit", "--config", str(QUICKSTART), *SHORT, *fixed, override]) == 2
    shown = capsys.readouterr()
    assert message in " ".join((shown.err + shown.out).split())


def test_an_empty_match_is_an_error(tmp_path, capsys):
    base = make_base(tmp_path / "softmax", attention="softmax")
    fixed = [f"model.path={base}", "tokenizer=null", f"run_dir={tmp_path / 'run'}", "adapter={preset: negative_branch}"]
    assert main(["fit", "--config", str(QUICKSTART), *SHORT, *fixed]) == 2
    assert "matches nothing: a softmax model has no negative map" in " ".join(capsys.readouterr().err.split())


def test_a_base_that_is_gone_is_named(finished, tmp_path):
    shutil.copytree(finished / "export", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"the base that .*adapter names is not there: .*gone does not exist"):
        load_model(tmp_path / "adapter")


def test_an_adapter_may_be_exported_over_but_other_folders_not(finished, base):
    assert run.fit(config_of(base, finished)) == 0
    assert (finished / "export" / "adapter_config.json").is_file()
