import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from difftune.losses import DIVERGENCES, TeacherStates, TopK, linear_divergence, top_k
from tests.largest_tensor import LargestTensor
from tests.tolerances import assert_within_budget

NAMES = tuple(DIVERGENCES)
N, C, D, V = 13, 8, 6, 17


def by_distributions(name, student, teacher, beta):
    """A row's divergence from torch.distributions, on logits."""
    p, q = Categorical(logits=teacher), Categorical(logits=student)
    if name == "forward_kl":
        return kl_divergence(p, q)
    if name == "reverse_kl":
        return kl_divergence(q, p)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


def by_entropies(name, student, teacher, beta):
    """The same from entropies and cross entropies, and H(m) - beta H(p) - (1 - beta) H(q) for the JSD."""
    p, q = teacher.softmax(-1), student.softmax(-1)

    def cross(a, b):
        return -(a * b.log()).sum(-1)

    if name == "forward_kl":
        return cross(p, q) - cross(p, p)
    if name == "reverse_kl":
        return cross(q, p) - cross(q, q)
    m = beta * p + (1 - beta) * q
    return cross(m, m) - beta * cross(p, p) - (1 - beta) * cross(q, q)


def plain(formula, name, hidden, weight, teacher, labels, temperature=1.0, beta=0.5):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student_logits, teacher_logits = (h @ w.T for h, w in ((hidden, weight), teacher))
    rows = formula(name, student_logits.to(wide) / temperature, teacher_logits.to(wide) / temperature, beta)
    return temperature**2 * rows[labels != -100].sum()


def chunked(name, hidden, weight, teacher, labels, **options):
    return linear_divergence(
        hidden, weight, labels, TeacherStates(*teacher), divergence=name, chunk_elements=5 * V, **options
    )[0]


def inputs(dtype=torch.float64, ignored=4):
    hidden, weight = torch.randn(N, C).to(dtype), torch.randn(V, C).to(dtype)
    teacher = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    labels = torch.randint(0, V, (N,))
    labels[torch.randperm(N)[:ignored]] = -100
    return hidden, weight, teacher, labels


def run(function, hidden, weight, *rest, **options):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, *rest, **options)
    (0.37 * loss).backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("formula", [by_distributions, by_entropies], ids=["distributions", "entropies"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_equal_two_other_formulas(name, temperature, formula):
    hidden, weight, teacher, labels = inputs()
    options = {"temperature": temperature, "beta": 0.3}
    expected = run(lambda h, w: plain(formula, name, h, w, teacher, labels, **options), hidden, weight)
    actual = run(lambda h, w: chunked(name, h, w, teacher, labels, **options), hidden, weight)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [0, 4, N], ids=["all-learned", "some-ignored", "none-learned"])
@pytest.mark.parametrize("name", NAMES)
def test_working_precision_stays_within_the_budget(name, ignored, dtype):
    hidden, weight, teacher, labels = inputs(dtype, ignored)

    def wide(x):
        return tuple(part.double() for part in x)

    def reference(h, w, t):
        return plain(by_distributions, name, h, w, t, labels, temperature=2.0)

    truth = run(reference, hidden.double(), weight.double(), wide(teacher))
    expected = run(reference, hidden, weight, teacher)
    actual = run(lambda h, w: chunked(name, h, w, teacher, labels, temperature=2.0), hidden, weight)
    for what, a, p, t in zip(["loss", "dhidden", "dweight"], actual, expected, truth, strict=True):
        # Terms of both signs: what cancels is as large as the entropy of a row.
        scale = max(t.abs().max().item(), math.log(V) * (labels != -100).sum().item()) if what == "loss" else None
        assert_within_budget(what, a, p, t, scale)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    hidden, weight, teacher, labels = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked(name, h, w, teacher, labels, temperature=1.7), (hidden, weight)
    )


def test_the_temperature_keeps_the_size_of_the_gradient():
    """Without T^2 the gradient at T = 20 would be some 400 times as small."""
    hidden, weight, teacher, labels = inputs()
    norms = [
        run(lambda h, w, t=t: chunked("forward_kl", h, w, teacher, labels, temperature=t), hidden, weight)[1].norm()
        for t in (1.0, 20.0)
    ]
    assert 0.2 < norms[1] / norms[0] < 5


def test_the_jsd_tends_to_both_kullback_leibler_divergences():
    hidden, weight, teacher, labels = inputs()
    hidden, teacher = 0.3 * hidden, [0.5 * part for part in teacher]  # the error is beta times a ratio of the two
    for name, side in (("forward_kl", lambda x: x), ("reverse_kl", lambda x: 1 - x)):
        limit = chunked(name, hidden, weight, teacher, labels)
        errors = []
        for small in (1e-4, 1e-6):
            jsd = chunked("generalized_jsd", hidden, weight, teacher, labels, beta=side(small))
            errors.append(abs(jsd / small - limit) / limit)
        assert errors[1] < 0.02 * errors[0] < 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_stored_probabilities_of_all_tokens_are_the_full_divergence(name, temperature):
    hidden, weight, teacher, labels = inputs(torch.float32)
    stored = top_k(teacher[0][labels != -100], teacher[1], V, temperature)
    assert stored.log_tail.isneginf().all()
    options = {"divergence": name, "temperature": temperature, "chunk_elements": 5 * V}
    full = run(lambda h, w: linear_divergence(h, w, labels, TeacherStates(*teacher), **options)[0], hidden, weight)
    top = run(lambda h, w: linear_divergence(h, w, labels, stored, **options)[0], hidden, weight)
    for a, e in zip(top, full, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6 * e.abs().max().item())


@pytest.mark.parametrize("k", [1, 3, V - 1])
@pytest.mark.parametrize("name", NAMES)
def test_the_tail_is_one_bucket_of_its_own(name, k):
    """Against both distributions summed into k + 1 classes by hand, gradients too."""
    hidden, weight, teacher, labels = inputs()
    kept = labels != -100
    stored = top_k(teacher[0][kept], teacher[1], k)

    def by_hand(h, w):
        buckets = []
        for probabilities in ((h[kept] @ w.T).softmax(-1), (teacher[0][kept] @ teacher[1].T).softmax(-1)):
            top = probabilities.gather(1, stored.indices)
            buckets.append(torch.cat([top, 1 - top.sum(1, keepdim=True)], dim=1).log())
        return by_distributions(name, *buckets, 0.5).sum()

    expected = run(by_hand, hidden, weight)
    actual = run(
        lambda h, w: linear_divergence(h, w, labels, stored, divergence=name, chunk_elements=5 * V)[0], hidden, weight
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


def test_the_tail_bucket_is_a_lower_bound_that_grows_with_k():
    hidden, weight, teacher, labels = inputs(ignored=0)
    values = [linear_divergence(hidden, weight, labels, top_k(*teacher, k))[0].item() for k in (1, 2, 4, 8, V)]
    assert values == sorted(values) and values[0] < 0.9 * values[-1]


def test_a_teacher_that_is_the_student_has_no_divergence_and_no_gradient():
    hidden, weight, _, labels = inputs()
    for name in NAMES:
        loss, *gradients = run(lambda h, w, n=name: chunked(n, h, w, (hidden, weight), labels), hidden, weight)
        assert loss.abs() < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients)


def test_no_label_token_gives_zero_with_zero_gradients():
    hidden, weight, teacher, labels = inputs(torch.float32, ignored=N)
    empty = TopK(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0))
    for target in (TeacherStates(*teacher), empty):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, count = linear_divergence(h, w, labels, target)
        loss.backward()
        assert loss == 0 and count == 0 and not h.grad.any() and not w.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_certain_distributions_stay_finite(name):
    """Probabilities that underflow to 0 count nothing, instead of 0 x inf."""
    hidden, teacher = torch.eye(V)[:3] * 200, torch.eye(V)[1:4] * 150
    loss, *gradients = run(
        lambda h, w: linear_divergence(h, w, torch.zeros(3), TeacherStates(teacher, torch.eye(V)), divergence=name)[0],
        hidden,
        torch.eye(V),
    )
    rows = {"forward_kl": 200.0, "reverse_kl": 150.0, "generalized_jsd": math.log(2)}
    assert loss.item() == pytest.approx(3 * rows[name], rel=1e-5)
    assert all(g.isfinite().all() for g in gradients)


def test_counts_the_labels_of_any_leading_shape():
    labels = torch.tensor([[0, -100, 2], [-100, -100, 1]])
    teacher = TeacherStates(torch.randn(2, 3, D), torch.randn(V, D))
    loss, count = linear_divergence(torch.randn(2, 3, C), torch.randn(V, C), labels, teacher)
    assert count.item() == 3 and loss > 0


def test_no_gradient_reaches_the_teacher():
    hidden, weight, teacher, labels = inputs()
    leaves = [part.requires_grad_() for part in teacher]
    loss = chunked("forward_kl", hidden.requires_grad_(), weight, leaves, labels)
    loss.backward()
    assert all(leaf.grad is None for leaf in leaves) and hidden.grad is not None


@pytest.mark.parametrize("k", [None, 7])
def test_all_logits_are_never_held(k):
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(512, 4), torch.randn(300, 4)
    teacher = TeacherStates(teacher_hidden, teacher_weight)
    if k is not None:
        teacher = top_k(teacher_hidden, teacher_weight, k)
    with LargestTensor() as largest:
        loss, _ = linear_divergence(hidden, weight, torch.zeros(512), teacher, chunk_elements=3000)
        loss.backward()
    assert largest.numel <= max(3000, 512 * 7), f"a tensor of {largest.numel} elements; all logits would be {512 * 300}"


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight, teacher, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = chunked("forward_kl", hidden, weight, teacher, labels)
    low = [part.bfloat16() for part in (hidden, weight, *teacher)]
    expected = chunked("forward_kl", low[0], low[1], low[2:], labels)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def test_top_k_is_sorted_and_its_masses_add_to_one():
    _, _, (hidden, weight), _ = inputs()
    stored = top_k(hidden, weight, 5, temperature=3.0)
    expected = F.softmax(hidden @ weight.T / 3.0, dim=-1).topk(5, dim=-1)
    torch.testing.assert_close(stored.log_probs.exp(), expected.values)
    assert torch.equal(stored.indices, expected.indices)
    torch.testing.assert_close(stored.log_probs.exp().sum(-1) + stored.log_tail.exp(), torch.ones(N).double())
    with pytest.raises(ValueError, match="k must be 1 to the 17 tokens"):
        top_k(hidden, weight, V + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "unknown divergence 'kl': choose one of forward_kl, reverse_kl, generalized_jsd"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"beta": 1.0}, "beta must be above 0 and below 1, got 1.0"),
        ({"hidden": torch.zeros(N, C + 1)}, "must agree"),
        ({"labels": torch.zeros(N - 1)}, r"labels must have shape \(13,\), got \(12,\)"),
        ({"teacher": TeacherStates(torch.zeros(N + 1, D), torch.zeros(V, D))}, "must see the same tokens"),
        ({"teacher": TeacherStates(torch.zeros(N, D), torch.zeros(V + 1, D))}, r"must have shape \(17, 6\)"),
        ({"teacher": top_k(torch.zeros(3, D), torch.zeros(V, D), 2)}, "has 3 rows for 13 label tokens"),
        ({"teacher": top_k(torch.zeros(N, D), torch.zeros(V + 1, D), V + 1)}, "does not fit the vocabulary of 17"),
        ({"teacher": TopK(torch.zeros(N, 2), torch.zeros(N, 3), torch.zeros(N))}, r"must be \(N, k\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    settings = {
        "hidden": torch.zeros(N, C),
        "weight": torch.zeros(V, C),
        "labels": torch.zeros(N),
        "teacher": TeacherStates(torch.zeros(N, D), torch.zeros(V, D)),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        linear_divergence(**settings)
