"""What a recipe comes to: defaults, merging, interpolation, stages, overrides."""

import dataclasses
from pathlib import Path

import pytest

from difftune.config import AdapterConfig, Config, ModelConfig, SourceConfig, load_config
from difftune.config.recipe import DataConfig

ENOUGH = ["tokenizer=digits", "data.train=[{path: synthetic:arithmetic}]", "trainer.max_steps=10"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def two_stages(tmp_path: Path) -> Path:
    return write(
        tmp_path / "two.yaml",
        """
tokenizer: digits
data: {seq_len: 64, train: [{path: synthetic:arithmetic}]}
optim: {lr: 1e-3}
trainer: {max_steps: 100}
stages:
  - name: answers
    data: {train: [{path: synthetic:arithmetic, answer_only: true}]}
  - name: traces
    optim: {lr: 5e-4}
    trainer: {max_steps: 200}
""",
    )


def test_overrides_alone_are_a_config_of_plain_dataclasses() -> None:
    config = load_config(None, ENOUGH)
    assert type(config) is Config and type(config.data.train[0]) is SourceConfig
    assert dataclasses.replace(config, data=Config().data, trainer=Config().trainer, tokenizer=None) == Config()


def test_run_dir_follows_the_name_of_the_recipe(two_stages: Path) -> None:
    assert load_config(two_stages).run_dir == "runs/two"
    assert load_config(two_stages, ["run_dir=elsewhere"]).run_dir == "elsewhere"


def test_a_recipe_without_stages_is_one_stage_named_main() -> None:
    config = load_config(None, [*ENOUGH, "seed=3"])
    (stage,) = config.resolved_stages()
    assert (stage.name, stage.seed) == ("main", 3)
    assert stage.data is config.data and stage.trainer is config.trainer


def test_a_stage_is_the_top_level_with_its_own_sections(two_stages: Path) -> None:
    answers, traces = load_config(two_stages).resolved_stages()
    assert (answers.name, answers.optim.lr, answers.trainer.max_steps) == ("answers", 1e-3, 100)
    assert (traces.name, traces.optim.lr, traces.trainer.max_steps) == ("traces", 5e-4, 200)
    assert answers.data.train[0].answer_only and not traces.data.train[0].answer_only
    assert answers.data.seq_len == traces.data.seq_len == 64


def test_an_override_wins_in_every_stage(two_stages: Path) -> None:
    config = load_config(two_stages, ["trainer.max_steps=7", "--optim.lr=1e-2", "data.train.0.limit=5"])
    assert [stage.trainer.max_steps for stage in config.stages] == [7, 7]
    assert [stage.optim.lr for stage in config.stages] == [1e-2, 1e-2]
    assert [stage.data.train[0].limit for stage in config.stages] == [5, 5]
    assert config.trainer.max_steps == 7


@pytest.mark.parametrize("address", ["stages.1", "stages.traces"])
def test_a_stage_is_reached_by_number_and_by_name(two_stages: Path, address: str) -> None:
    config = load_config(two_stages, [f"{address}.trainer.max_steps=5", "trainer.max_steps=7"])
    assert [stage.trainer.max_steps for stage in config.stages] == [7, 5], "the more specific override wins"


def test_a_star_reaches_every_item(two_stages: Path) -> None:
    assert [stage.seed for stage in load_config(two_stages, ["stages.*.seed=4"]).stages] == [4, 4]


def test_stages_without_names_are_numbered() -> None:
    config = load_config(None, [*ENOUGH, "stages=[{}, {seed: 2}]"])
    assert [(stage.name, stage.seed) for stage in config.stages] == [("stage0", 0), ("stage1", 2)]


def test_interpolation_follows_the_stage_that_it_stands_in(two_stages: Path) -> None:
    recipe = write(
        two_stages.parent / "three.yaml",
        "base: two.yaml\nevaluation: {batch_size: '${data.seq_len}'}\n"
        "stages: [{name: short}, {name: long, data: {seq_len: 128}}]\n",
    )
    config = load_config(recipe)
    assert [stage.evaluation.batch_size for stage in config.stages] == [64, 128]
    assert [s.evaluation.batch_size for s in load_config(recipe, ["data.seq_len=32"]).stages] == [32, 32]


def test_environment_variables_have_defaults_and_become_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    override = "data.seq_len=${oc.env:DIFFTUNE_TEST_LENGTH,512}"
    monkeypatch.delenv("DIFFTUNE_TEST_LENGTH", raising=False)
    assert load_config(None, [*ENOUGH, override]).data.seq_len == 512
    monkeypatch.setenv("DIFFTUNE_TEST_LENGTH", "256")
    assert load_config(None, [*ENOUGH, override]).data.seq_len == 256


def test_a_base_recipe_lies_beneath_and_is_found_from_its_user(tmp_path: Path, two_stages: Path) -> None:
    (tmp_path / "inner").mkdir()
    middle = write(tmp_path / "inner" / "middle.yaml", "base: ../two.yaml\noptim: {lr: 2e-3, weight_decay: 0.3}\n")
    top = write(tmp_path / "top.yaml", "base: inner/middle.yaml\noptim: {lr: 3e-3}\nstages: []\n")
    config = load_config(top)
    assert (config.optim.lr, config.optim.weight_decay, config.data.seq_len) == (3e-3, 0.3, 64)
    assert config.stages == [] and config.run_dir == "runs/top"
    assert load_config(middle).stages[1].optim.lr == 5e-4


def test_a_model_path_replaces_the_architecture_beneath_it(tmp_path: Path) -> None:
    fresh = write(
        tmp_path / "fresh.yaml",
        "tokenizer: digits\nmodel: {hidden_size: 64, num_hidden_layers: 2, dtype: bfloat16}\n"
        "data: {train: [{path: a.jsonl}]}\ntrainer: {max_steps: 1}\n",
    )
    assert load_config(fresh).model.architecture() == {"hidden_size": 64, "num_hidden_layers": 2}
    for config in (
        load_config(fresh, ["model.path=checkpoint"]),
        load_config(write(tmp_path / "loaded.yaml", "base: fresh.yaml\nmodel: {path: checkpoint}\n")),
    ):
        assert config.model == ModelConfig(path="checkpoint", dtype="bfloat16")
    required = write(tmp_path / "required.yaml", "base: fresh.yaml\nmodel: {path: '???'}\n")
    with pytest.raises(ValueError, match=r"required\.yaml:2: model\.path has to be given; add model\.path=VALUE"):
        load_config(required)
    assert load_config(required, ["model.path=null"]).model == load_config(fresh).model
    assert load_config(required, ["model.path=checkpoint"]).model.hidden_size is None
    with pytest.raises(ValueError, match=r"comes with the weights; leave out model\.hidden_size$"):
        load_config(fresh, ["model.path=checkpoint", "model.hidden_size=64"])


@pytest.mark.parametrize("override", ["tokenizer=null", "optim.lambda_lr=null", "export=null"])
def test_null_is_none_where_a_key_may_be_empty(override: str) -> None:
    section, _, name = override.removesuffix("=null").rpartition(".")
    config = load_config(None, [*ENOUGH, "model.path=m", "optim.lambda_lr=0.1", "export={}", override])
    assert getattr(getattr(config, section) if section else config, name) is None


def test_later_overrides_win_and_mappings_merge() -> None:
    rope = "model.rope_parameters={rope_type: default, rope_theta: 10000}"
    config = load_config(None, [*ENOUGH, "seed=1", "seed=2", rope, "model.rope_parameters.rope_theta=640000"])
    assert config.seed == 2
    assert config.model.rope_parameters == {"rope_type": "default", "rope_theta": 640000}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("2", 2.0), ("1_0.0", 10.0)],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    lr = load_config(None, [*ENOUGH, f"optim.lr={text}"]).optim.lr
    assert lr == value and isinstance(lr, float)


def test_a_whole_float_is_an_integer_and_devices_may_be_a_list() -> None:
    config = load_config(None, [*ENOUGH, "trainer.max_steps=2e4", "trainer.devices=[0, 2]"])
    assert config.trainer.max_steps == 20000 and isinstance(config.trainer.max_steps, int)
    assert config.trainer.devices == [0, 2]


def test_a_time_limit_is_text_and_not_a_base_60_number() -> None:
    assert load_config(None, [*ENOUGH, "trainer.max_time=10:08:00:00"]).trainer.max_time == "10:08:00:00"


def test_all_problems_are_told_together_with_their_places_in_reading_order(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "wrong.yaml",
        "trainer:\n  max_stepz: 10\n  precision: bf16-mixd\ndata:\n  seq_len: long\nstages:\n  - optim: {lr: abc}\n",
    )
    with pytest.raises(ValueError) as failure:
        load_config(recipe, ["seed=-1"])
    assert str(failure.value).splitlines() == [
        f"5 problems in {recipe}:",
        f"  {recipe}:2: unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?",
        f"  {recipe}:3: trainer.precision must be one of 32-true, bf16-mixed, 16-mixed, got 'bf16-mixd'; "
        "did you mean 'bf16-mixed'?",
        f"  {recipe}:5: data.seq_len must be an integer, got 'long'",
        f"  {recipe}:7: stages.stage0.optim.lr must be a number, got 'abc'",
        "  command line (seed=...): seed must be at least 0, got -1",
    ]


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe not found: .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_architecture_keys_are_those_of_the_model() -> None:
    from difftune.modeling import DiffTransformerConfig

    ours = {f.name for f in dataclasses.fields(ModelConfig)} - {
        "path",
        "dtype",
        "quantization",
        "gradient_checkpointing",
        "gradient_checkpointing_every",
        "mlp_chunk",
    }
    set_by_us = {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
    theirs = {f.name for f in dataclasses.fields(DiffTransformerConfig)} & set(DiffTransformerConfig.__annotations__)
    assert ours == theirs - set_by_us


def test_the_keys_of_a_source_are_those_of_the_data_room() -> None:
    from difftune.data.sources import Source

    ours, theirs = ({f.name: f.default for f in dataclasses.fields(cls)} for cls in (SourceConfig, Source))
    # One for all sources of a stage.
    assert ours | {"bad_rows": DataConfig().bad_rows} == theirs


def test_the_keys_of_an_adapter_are_those_of_the_model_room() -> None:
    from difftune.modeling.adapter_settings import PRESETS, AdapterSettings

    assert dataclasses.asdict(AdapterConfig()) == dataclasses.asdict(AdapterSettings())
    choices = next(f.metadata["choices"] for f in dataclasses.fields(AdapterConfig) if f.name == "preset")
    assert choices == PRESETS


def test_an_adapter_is_off_unless_asked_for_and_one_for_all_stages(tmp_path: Path) -> None:
    enough = ["model.path=m", "data.train=[{path: a.jsonl}]", "trainer.max_steps=10"]
    assert load_config(None, enough).adapter is None
    # A key of a section that is off turns it on.
    assert load_config(None, [*enough, "adapter.rank=4"]).adapter == AdapterConfig(rank=4)
    assert load_config(None, [*enough, "adapter={}", "adapter.ranks.negative=2"]).adapter.ranks == {"negative": 2}
    (tmp_path / "x.yaml").write_text("stages:\n  - name: a\n    adapter: {rank: 3}\n")
    with pytest.raises(ValueError, match=r"x.yaml:3: 'stages.0.adapter': 'adapter' is one for all stages"):
        load_config(tmp_path / "x.yaml", enough)
