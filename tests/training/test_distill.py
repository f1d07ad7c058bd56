import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything

from difftune.builder.on_policy import StudentSampler
from difftune.modeling.modeling import recompute_blocks
from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import find_resumable
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
    module._dtype, module._parts = torch.float64, torch.zeros(4, dtype=torch.float64)
    batch = one_batch(build_arithmetic())
    loss, count = module.compute_loss({**batch, "labels": torch.full_like(batch["labels"], -100)})
    loss.backward()
    assert loss == 0 and count == 0


def as_it_is(seen):
    """A sampler that takes note of its batches and leaves them as they are."""

    def take(model, batch, number, rank, ranks_per_machine):
        seen.append(number)
        return batch

    return take


def sampler(**settings):
    return StudentSampler(TOKENIZER, **{"seq_len": 64, "max_new_tokens": 16, "seed": 0, **settings})


@pytest.mark.parametrize(
    ("share", "batches"),
    [(0.0, []), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (0.75, [1, 2, 3, 5, 6, 7]), (1.0, [*range(8)])],
)
def test_the_share_of_own_batches_is_spread_evenly(share, batches):
    seen = []
    fit(build_module(on_policy=as_it_is(seen), on_policy_share=share), build_arithmetic(), 4, accumulate_grad_batches=2)
    assert seen == batches


def test_own_batches_have_no_cross_entropy_and_others_keep_theirs():
    """The sampler changes nothing, so the divergence of both kinds is that of the data."""
    logged = {}
    for share in (0.0, 0.5, 1.0):
        module = build_module(weight=0.3, on_policy=as_it_is([]), on_policy_share=share)
        fit(module, build_arithmetic(), steps=1, accumulate_grad_batches=2)
        logged[share] = module.logged
    plain, half, own = logged.values()
    assert own["train/loss"] == pytest.approx(0.3 * own["train/divergence"], rel=1e-6)
    assert own["train/divergence"] == half["train/divergence"] == plain["train/divergence"]
    assert "train/cross_entropy" not in own and own["train/on_policy_tokens"] == own["train/label_tokens"]
    assert plain["train/on_policy_tokens"] == 0
    first = 1 - half["train/on_policy_tokens"] / half["train/label_tokens"]
    assert 0.2 < first < 0.8
    expected = 0.3 * half["train/divergence"] + 0.7 * first * half["train/cross_entropy"]
    assert half["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_a_share_of_nothing_is_training_without_a_sampler_to_the_bit():
    plain, none = (
        fit(build_module(**options), build_arithmetic()).steps[-1][1]
        for options in ({}, {"on_policy": sampler(), "on_policy_share": 0.0})
    )
    assert torch.equal(plain, none)


def test_a_resumed_run_samples_what_the_straight_one_does(tmp_path):
    def run(folder, steps):
        module = build_module(on_policy=sampler(), on_policy_share=0.75)
        callbacks = [Checkpointing(tmp_path / folder, every_n_steps=2), recorder := Recorder()]
        trainer = build_trainer(callbacks, max_steps=steps, log_every_n_steps=1)
        trainer.fit(module, build_arithmetic(), ckpt_path=find_resumable(tmp_path / folder))
        return recorder.steps[-1][1]

    straight = run("straight", 4)
    run("cut", 2)
    assert torch.equal(run("cut", 4), straight)


def test_weights_that_wrote_under_autocast_get_their_gradients():
    """Writing needs no gradients; the casts of the weights that autocast keeps from it must not pass that on."""
    student = build_student()
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    fit(
        build_module(student, on_policy=sampler(), on_policy_share=1.0),
        build_arithmetic(),
        steps=1,
        precision="bf16-mixed",
    )
    assert [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])] == []


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_write_the_same_texts(every):
    batch, student = one_batch(build_arithmetic()), build_student().train()
    plain = sampler()(student, batch, 0, 0)
    recompute_blocks(student, every=every)
    own = sampler()(student, batch, 0, 0)
    assert torch.equal(own["input_ids"], plain["input_ids"])
    assert [layer.gradient_checkpointing and layer.training for layer in student.model.layers] == [True, every == 1]


def test_a_student_comes_nearer_to_its_teacher_on_its_own_texts():
    """Measured on fresh samples to the same prompts, before and after, with the reverse KL that it minimises."""
    student, llama = build_student(), build_llama(initializer_range=0.1)
    batch = one_batch(build_arithmetic(micro_batch_size=4))

    @torch.no_grad()
    def distance():
        own = sampler(seed=7, max_new_tokens=8)(student, batch, 0, 0)
        inputs = {"input_ids": own["input_ids"], "position_ids": own["position_ids"], "use_cache": False}
        log_q = F.log_softmax(student(**inputs, cu_seqlens=own["cu_seqlens"]).logits[:, :-1], dim=-1)
        log_p = F.log_softmax(llama(**inputs).logits[:, :-1], dim=-1)
        kept = own["labels"][:, 1:] != -100
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)[kept].mean().item()

    before = distance()
    options = {
        "divergence": "reverse_kl",
        "weight": 1.0,
        "on_policy": sampler(max_new_tokens=6),
        "on_policy_share": 1.0,
    }
    fit(build_module(student, llama, **options), build_arithmetic(micro_batch_size=1), steps=20)
    assert distance() < 0.8 * before


def test_on_policy_without_a_running_teacher_is_refused():
    with pytest.raises(ValueError, match=r"answers of the student need a teacher that runs: set distill\.top_k=null"):
        DistillModule(build_student(), teacher=None, on_policy=sampler(), **SETTINGS)
