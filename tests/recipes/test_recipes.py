"""Every recipe: it loads, its model builds on the meta device, and the paper's recipes hold the paper's numbers."""

from pathlib import Path

import pytest
import torch

from difftune.config import Config, StageConfig, load_config
from difftune.config.text import to_yaml

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# What a user has to bring to a recipe, beside the recipe.
FRESH = {
    "math_stage1": ["model.path=null"],
    "math_stage2": ["model.path=null", "tokenizer=bytes"],
    "openthoughts": ["model.path=null", "tokenizer=bytes"],
    "long_context_64k": [
        *("model.path=null", "tokenizer=bytes", "model.num_hidden_layers=28", "model.hidden_size=3072"),
        *("model.intermediate_size=8192", "model.num_attention_heads=24", "model.num_key_value_heads=24"),
        *("model.head_dim=128", "model.vocab_size=100288"),
    ],
    "long_context_64k_lora_1gpu": ["model.path=my-3b", "tokenizer=bytes"],
}


def load(path: Path) -> Config:
    return load_config(path, FRESH.get(path.stem, []))


def recipe(name: str) -> Config:
    return load(ROOT / "recipes" / f"{name}.yaml")


def tokens_per_step(stage: StageConfig) -> int:
    assert isinstance(stage.trainer.devices, int)
    rows = stage.data.micro_batch_size * stage.trainer.devices * stage.trainer.accumulate_grad_batches
    return rows * stage.data.seq_len


def test_the_recipes_of_the_issue_exist() -> None:
    assert {"quickstart", "math_stage1", "math_stage2", "gsm8k_small"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_resolved_form_is_the_same(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert config.run_dir == f"runs/{path.stem}"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_model_of_a_recipe_builds_on_the_meta_device(path: Path) -> None:
    from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

    config = load(path)
    with torch.device("meta"):
        model = DiffTransformerForCausalLM(DiffTransformerConfig(**config.model.architecture()))
    assert all(stage.data.seq_len <= model.config.max_position_embeddings for stage in config.resolved_stages())
    if path.stem.startswith("math_stage"):
        parameters = sum(p.numel() for p in model.parameters())
        assert 3.4e9 < parameters < 3.6e9 and model.config.num_diff_heads == 12
        assert {layer.self_attn.q1_proj.out_features for layer in model.model.layers} == {12 * 128}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sparse(path: Path) -> None:
    """A line that says what the default says anyway hides what is special about a recipe."""
    import dataclasses

    import yaml

    written = yaml.safe_load(path.read_text())
    defaults = dataclasses.asdict(Config())
    base = written.pop("base", None)
    if base is not None:
        return
    repeated = [
        f"{section}.{key}"
        for section, keys in written.items()
        if isinstance(keys, dict) and isinstance(defaults.get(section), dict)
        for key, value in keys.items()
        if defaults[section][key] == value and value is not None
    ]
    allowed = {"optim.betas", "optim.weight_decay", "optim.schedule", "trainer.gradient_clip_val"}  # the paper's
    assert set(repeated) <= allowed


def test_stage_1_has_the_papers_hyperparameters() -> None:
    """Appendix C, and for what it inherits Sections 3.1 and 3.3."""
    config = recipe("math_stage1")
    (stage,) = config.resolved_stages()
    assert (stage.optim.lr, stage.optim.betas, stage.optim.weight_decay) == (8e-5, [0.9, 0.95], 0.1)
    assert (stage.optim.warmup_steps, stage.optim.schedule) == (1000, "linear")
    assert stage.optim.min_lr_ratio == pytest.approx(1.28e-5 / 3.2e-4)
    assert tokens_per_step(stage) == 2**22
    assert stage.trainer.max_steps == int(20e9 / 2**22)
    assert stage.evaluation.every_n_tokens == 2_000_000_000 and stage.evaluation.max_new_tokens == 1024
    assert len(stage.evaluation.tasks) == 8
    model = config.model
    assert (model.num_hidden_layers, model.hidden_size, model.intermediate_size) == (28, 3072, 8192)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (24, 24, 128)
    assert (model.vocab_size, model.max_position_embeddings) == (100288, 65536)
    assert model.rope_parameters == {"rope_type": "default", "rope_theta": 640000.0}


def test_stage_2_has_the_papers_hyperparameters_and_inherits_the_rest() -> None:
    config, before = recipe("math_stage2"), recipe("math_stage1")
    (stage,) = config.resolved_stages()
    assert stage.optim.lr == 1e-5
    assert {**vars(stage.optim), "lr": 8e-5} == vars(before.optim)
    assert tokens_per_step(stage) == 2**20
    assert stage.trainer.max_steps == int(2e9 / 2**20)
    assert stage.evaluation.max_new_tokens == 16384
    assert stage.checkpoint.best_metric is not None and stage.checkpoint.best_mode == "max"
    assert config.model == before.model
    assert stage.data.train[0].path == "open-r1/OpenThoughts-114k-math"


def test_the_64k_recipe_has_the_papers_hyperparameters() -> None:
    """Section 3.3, and for the rest 3.1."""
    config = recipe("long_context_64k")
    (stage,) = config.resolved_stages()
    assert config.model.rope_parameters == {"rope_type": "default", "rope_theta": 640000.0}
    assert stage.data.seq_len == config.model.max_position_embeddings == 65536
    assert (stage.optim.lr, stage.optim.betas, stage.optim.weight_decay) == (8e-5, [0.9, 0.95], 0.1)
    assert tokens_per_step(stage) == 2**22 * stage.trainer.context_parallel_size
    assert stage.trainer.max_steps == int(1.5e9 / 2**22)
    assert stage.data.upsample is not None and stage.trainer.strategy == "fsdp"
    kinds = {task.kind: task for task in stage.evaluation.tasks}
    assert kinds["nll"].length == 65536 and (kinds["needle"].needles, kinds["needle"].queries) == (8, 1)
    assert kinds["needle"].lengths == list(range(8192, 65537, 8192))


@pytest.mark.parametrize("name", ["long_context_64k", "long_context_64k_lora_1gpu"])
def test_a_recipe_for_64k_extends_whatever_model_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path has to be given"):
        load_config(ROOT / "recipes" / f"{name}.yaml")
    model = load_config(ROOT / "recipes" / f"{name}.yaml", ["model.path=my-3b"]).model
    assert set(model.architecture()) == {"rope_parameters", "max_position_embeddings"}
    assert model.gradient_checkpointing and model.mlp_chunk


def test_the_64k_recipe_runs_dry_on_the_meta_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's 3B on a machine that it does not fit: all is built but for the step."""
    import json

    from difftune.commands import run

    texts = ["A sentence of a long book. " * 400, "A short one."]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("difftune.commands.dry_run._memory", lambda: ("machine", 2**34))
    tasks = "evaluation.tasks=[{kind: nll, path: 'synthetic:prose', name: books, length: 65536}]"
    overrides = [*FRESH["long_context_64k"], "data.train.0.path=long.jsonl", tasks]
    assert run.fit(load_config(ROOT / "recipes" / "long_context_64k.yaml", overrides), dry_run=True) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "No step was taken: the model does not fit this machine" in printed
    assert "of them in long documents 10,8" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "long.jsonl"], "nothing is written"


@pytest.mark.parametrize("name", ["math_stage1", "math_stage2"])
def test_the_papers_recipes_ask_for_a_model(name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path has to be given"):
        load_config(ROOT / "recipes" / f"{name}.yaml")
    config = load_config(ROOT / "recipes" / f"{name}.yaml", ["model.path=my-3b"])
    assert config.model.architecture() == {}, "the checkpoint brings its architecture"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_a_header_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed as a shell would, with the local files that they name replaced by nothing: the config is built."""
    import shlex

    from difftune import cli

    monkeypatch.chdir(ROOT)
    header = "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    commands = [line for line in header.replace("\\\n", " ").splitlines() if "difftune fit" in line]
    assert commands
    for command in commands:
        found = cli.parse(shlex.split(command[command.index("difftune fit") :])[1:])
        assert load_config(found.values["config"][0], found.overrides).resolved_stages()


@pytest.mark.parametrize("preset", ["lambda_only", "negative_branch", "attention", "all_linear"])
def test_every_preset_of_the_adapter_recipe_trains(
    preset: str, quickstart_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from difftune.checkpoints.load import load_model
    from difftune.commands import run

    monkeypatch.chdir(quickstart_model)
    short = ["trainer.max_steps=2", "optim.warmup_steps=1", "logging.loggers=[jsonl]", "logging.progress_bar=false"]
    short += ["data.train.*.options.count=100", "evaluation.tasks.*.limit=4", "evaluation.every_fraction=null"]
    chosen = [] if preset == "attention" else [f"adapter.preset={preset}"]
    config = load_config(ROOT / "recipes" / "quickstart_lora.yaml", [*short, *chosen, f"run_dir={tmp_path}"])
    assert config.adapter is not None and config.adapter.preset == preset
    assert run.fit(config) == 0
    start, trained = (load_model(path).state_dict() for path in ("runs/quickstart/export", tmp_path / "export"))
    changed = {name.split(".")[-2] for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    attention = {"q1_proj", "q2_proj", "k1_proj", "k2_proj", "v_proj", "o_proj"}
    expected = {
        "lambda_only": set(),
        "negative_branch": {"q2_proj", "k2_proj"},
        "attention": attention,
        "all_linear": attention | {"gate_proj", "up_proj", "down_proj"},
    }
    assert changed == expected[preset] | {"lambda_full"}


@pytest.fixture(scope="module")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small fresh model where the quickstart leaves its own."""
    from difftune.builder import build_model, build_tokenizer

    config = load_config(ROOT / "recipes" / "quickstart.yaml", ["model.hidden_size=32", "model.intermediate_size=32"])
    tokenizer = build_tokenizer(config)
    folder = tmp_path_factory.mktemp("quickstart")
    for part in (build_model(config.model, tokenizer, 0), tokenizer):
        part.save_pretrained(folder / "runs" / "quickstart" / "export")
    return folder
