"""What a recipe with a teacher becomes, and that a dry run of it writes and loads no more than it must."""

import pytest
import torch

from difftune.builder import build_data, build_model, build_module, build_tokenizer, distill
from difftune.builder.on_policy import StudentSampler
from difftune.commands import run
from difftune.config import load_config
from tests.commands.test_prepare import MODEL, TRAIN, prepare, teacher  # noqa: F401  # a fixture
from tests.training.teaching import VOCABULARY


def config_of(folder, run_dir, *overrides):
    return load_config(None, [*MODEL, *TRAIN, f"distill.teacher={folder}", f"run_dir={run_dir}", *overrides])


def module_of(config):
    tokenizer, (stage,) = build_tokenizer(config), config.resolved_stages()
    return build_module(stage, build_model(config.model, tokenizer, 0), build_data(stage, tokenizer, None), tokenizer)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_keys_of_a_recipe_reach_the_module(teacher, tmp_path):  # noqa: F811
    keys = {"weight": 0.4, "divergence": "generalized_jsd", "beta": 0.2, "temperature": 1.5, "on_policy_share": 0.25}
    module = module_of(config_of(teacher, tmp_path, *(f"distill.{key}={value}" for key, value in keys.items())))
    assert {key: getattr(module, key) for key in keys} == keys
    assert isinstance(module.on_policy, StudentSampler) and module.teacher.model.config.hidden_size == 40
    assert module_of(config_of(teacher, tmp_path)).on_policy is None


def test_a_teacher_is_held_in_4_bits(teacher, tmp_path):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    config = config_of(teacher, tmp_path, "distill.teacher_quantization=nf4", "distill.teacher_dtype=float32")
    model = module_of(config).teacher.model
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert model.lm_head.weight.dtype == torch.float32


def test_a_dry_run_of_a_large_student_loads_no_teacher(teacher, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("difftune.commands.dry_run.total_memory_bytes", lambda: 10_000)
    seen = []
    build = distill.build_teacher

    def keep(*arguments, **options):
        seen.append(build(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(distill, "build_teacher", keep)
    (teacher / "model.safetensors").rename(teacher / "moved")
    try:
        assert run.fit(config_of(teacher, tmp_path / "run"), dry_run=True) == 0
    finally:
        (teacher / "moved").rename(teacher / "model.safetensors")
    assert "No step was taken" in capsys.readouterr().out
    assert all(parameter.is_meta for parameter in seen[0].model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_with_a_running_teacher_writes_nothing(teacher, tmp_path, capsys):  # noqa: F811
    before = files(teacher)
    config = config_of(teacher, tmp_path / "run", "distill.on_policy_share=1.0", "distill.on_policy_max_new_tokens=4")
    assert run.fit(config, dry_run=True) == 0
    assert "one step on one micro-batch: loss" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and files(teacher) == before


def test_a_dry_run_with_a_stored_teacher_writes_nothing(teacher, tmp_path, capsys):  # noqa: F811
    top_k = (f"distill.top_k={VOCABULARY}", "data.train=[{path: 'synthetic:arithmetic', options: {count: 40}}]")
    config = config_of(teacher, tmp_path / "run", *top_k)
    with pytest.raises(ValueError, match=r"nothing is stored of the teacher .* run `difftune prepare --teacher`"):
        run.fit(config, dry_run=True)
    assert list(tmp_path.iterdir()) == [], "refused before anything is tokenised"
    prepare(*MODEL, *TRAIN, f"distill.teacher={teacher}", f"run_dir={tmp_path / 'run'}", *top_k, teacher=True)
    before = files(tmp_path)
    assert run.fit(config, dry_run=True) == 0
    assert "one step on one micro-batch: loss" in capsys.readouterr().out
    assert files(tmp_path) == before
