import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything

from difftune.training.checkpoint import Checkpointing
from difftune.training.distill import DistillModule
from difftune.training.finetune import FinetuneModule
from difftune.training.teachers import OnlineTeacher
from tests.training.teaching import TOKENIZER, VOCABULARY, build_arithmetic, build_llama, build_student, one_batch
from tests.training.toy import Recorder, build_trainer

SETTINGS = {"lr": 5e-3, "schedule": "constant"}


def build_module(student=None, teacher=None, **options):
    seed_everything(3, verbose=False)
    teacher = OnlineTeacher(teacher or build_llama(), vocab_size=VOCABULARY)
    return DistillModule(student or build_student(), teacher=teacher, **{**SETTINGS, **options})


def fit(module, data, steps=3, **settings):
    recorder = Recorder()
    build_trainer([recorder], max_steps=steps, log_every_n_steps=1, **settings).fit(module, data)
    return recorder


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_both_parts_weighted_and_a_mean_over_label_tokens(weight):
    student, llama = build_student(), build_llama()
    batch = one_batch(build_arithmetic())
    kept = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        logits = {}
        for name, model in (("student", student), ("teacher", llama)):
            extra = {"cu_seqlens": batch["cu_seqlens"]} if name == "student" else {}
            out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **extra)
            logits[name] = out.logits[:, :-1][kept]
        log_q, log_p = (F.log_softmax(logits[name] / 2.0, dim=-1) for name in ("student", "teacher"))
        divergence = 4.0 * F.kl_div(log_q, log_p, log_target=True, reduction="sum") / kept.sum()
        cross_entropy = F.cross_entropy(logits["student"], batch["labels"][:, 1:][kept])
    module = build_module(student, llama, weight=weight, temperature=2.0)
    fit(module, build_arithmetic(), steps=1)
    assert module.logged["train/divergence"] == pytest.approx(divergence.item(), rel=1e-5)
    expected = weight * divergence + (1 - weight) * cross_entropy
    assert module.logged["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert module.logged["train/label_tokens"] == kept.sum()
    assert ("train/cross_entropy" in module.logged) == (weight < 1)
    if weight < 1:
        assert module.logged["train/cross_entropy"] == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_accumulation_of_two_equals_one_batch_of_twice_the_rows():
    ends = []
    for rows, accumulate in ((4, 1), (2, 2)):
        data = build_arithmetic(micro_batch_size=rows)
        module = build_module(build_student().double(), build_llama().double())
        ends.append(fit(module, data, accumulate_grad_batches=accumulate).steps[-1][1])
        assert {"train/divergence", "train/cross_entropy"} <= set(module.logged)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


def test_the_student_comes_nearer_to_its_teacher():
    module = build_module(weight=1.0)
    fit(module, build_arithmetic(), steps=1)
    before = module.logged["train/divergence"]
    module = build_module(weight=1.0)
    fit(module, build_arithmetic(), steps=30)
    assert module.logged["train/divergence"] < 0.8 * before


def test_the_teacher_is_in_no_checkpoint_and_not_in_the_optimiser(tmp_path):
    student = build_student()
    module = build_module(student)
    trainer = build_trainer([Checkpointing(tmp_path, every_n_steps=2)], max_steps=2)
    trainer.fit(module, build_arithmetic())
    assert set(module.state_dict()) == {f"model.{name}" for name in student.state_dict()}
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}
    plain = build_trainer([Checkpointing(tmp_path / "plain", every_n_steps=2)], max_steps=2)
    plain.fit(FinetuneModule(build_student(), **SETTINGS), build_arithmetic())
    sizes = [sum(f.stat().st_size for f in folder.glob("step-*/*")) for folder in (tmp_path, tmp_path / "plain")]
    assert abs(sizes[0] - sizes[1]) < 2000


def test_a_batch_without_a_teacher_is_refused():
    module = DistillModule(build_student(), teacher=None, **SETTINGS)
    with pytest.raises(ValueError, match="brings nothing stored of one: run difftune prepare"):
        fit(module, build_arithmetic())


@pytest.mark.parametrize("weight", [0.0, 1.1])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, got {weight}"):
        DistillModule(build_student(), teacher=None, weight=weight, **SETTINGS)


def test_the_tokenizer_of_the_tests_fits_the_models():
    assert len(TOKENIZER) == VOCABULARY == build_student().config.vocab_size


def test_attention_outputs_are_matched_at_first_and_no_more_after_the_warm_up():
    """The match adds to the loss as long as its weight lasts; the first loss is larger by exactly its share."""
    plain, aligned = ([], [])
    for losses, options in ((plain, {}), (aligned, {"align_weight": 0.5, "align_steps": 2})):
        module = build_module(build_student(hidden_size=40, head_dim=8), weight=1.0, **options)
        module.log_metrics = lambda metrics, step, losses=losses: losses.append(metrics["train/loss"])
        fit(module, build_arithmetic(), steps=4)
        assert [module._align_weight() > 0] == [False]
    assert aligned[0] > plain[0] + 0.1
    parts = build_module(build_student(hidden_size=40, head_dim=8), weight=1.0, align_weight=0.5, align_steps=2)
    fit(parts, build_arithmetic(), steps=4)
    assert parts.logged["train/loss"] == pytest.approx(parts.logged["train/divergence"], rel=1e-6)


def test_a_match_needs_a_teacher_that_runs():
    with pytest.raises(ValueError, match=r"set distill\.top_k=null"):
        DistillModule(build_student(), teacher=None, align_weight=1.0, align_steps=5, **SETTINGS)


def test_a_batch_without_labels_needs_nothing_stored():
    """The share of a rank for which the last batch had no row: it steps with the others."""
    module = DistillModule(build_student(), teacher=None, **SETTINGS)
    module._dtype, module._parts = torch.float64, torch.zeros(2, dtype=torch.float64)
    batch = one_batch(build_arithmetic())
    loss, count = module.compute_loss({**batch, "labels": torch.full_like(batch["labels"], -100)})
    loss.backward()
    assert loss == 0 and count == 0
