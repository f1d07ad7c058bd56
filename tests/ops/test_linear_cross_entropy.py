import pytest
import torch
import torch.nn.functional as F

from difftune.ops import linear_cross_entropy
from tests.largest_tensor import LargestTensor
from tests.tolerances import assert_within_budget


def plain(hidden, weight, labels, z_loss=0.0):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    kept = labels != -100
    z = logits.logsumexp(-1)[kept].square().sum()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) + z_loss * z


def run(function, hidden, weight, labels, **options):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, labels, **options)
    (0.37 * loss).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def chunked(hidden, weight, labels, **options):
    return linear_cross_entropy(hidden, weight, labels, chunk_elements=5 * weight.shape[0], **options)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("ignored", [0, 4, 13], ids=["all-learned", "some-ignored", "none-learned"])
def test_chunked_equals_plain(dtype, z_loss, ignored):
    hidden, weight = torch.randn(13, 8).to(dtype), torch.randn(17, 8).to(dtype)
    labels = torch.randint(0, 17, (13,))
    labels[torch.randperm(13)[:ignored]] = -100
    truth = run(plain, hidden.double(), weight.double(), labels, z_loss=z_loss)
    expected = run(plain, hidden, weight, labels, z_loss=z_loss)
    actual = run(chunked, hidden, weight, labels, z_loss=z_loss)
    for name, a, p, t in zip(["loss", "dhidden", "dweight"], actual, expected, truth, strict=True):
        assert_within_budget(name, a, p, t)


def test_gradcheck():
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, -100, 2, 1, 3])
    assert torch.autograd.gradcheck(lambda h, w: chunked(h, w, labels, z_loss=0.1), (hidden, weight))


def test_counts_the_labels_of_any_leading_shape():
    labels = torch.tensor([[0, -100, 2], [-100, -100, 1]])
    loss, count = linear_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(5, 4), labels)
    assert count.item() == 3
    torch.testing.assert_close(loss, 3 * torch.tensor(5.0).log())


def test_only_the_gradients_asked_for_are_made():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2]))
    assert [None if x is None else tuple(x.shape) for x in loss.grad_fn.saved_tensors] == [(3, 4), None]


def test_all_logits_are_never_held():
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with LargestTensor() as largest:
        loss, _ = linear_cross_entropy(hidden, weight, torch.randint(0, 300, (512,)), chunk_elements=3000)
        loss.backward()
    assert largest.numel <= 3000, f"a tensor of {largest.numel} elements; all logits would be {512 * 300}"


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight, labels = torch.randn(7, 8), torch.randn(9, 8), torch.randint(0, 9, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = linear_cross_entropy(hidden, weight, labels)
    expected, _ = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(5, 4), torch.tensor([0, 1]), "must agree"),
        (
            torch.zeros(2, 4),
            torch.zeros(5, 4),
            torch.tensor([0]),
            r"labels must have shape \(2,\), got \(1,\)",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(5, 4),
            torch.tensor([0, 5]),
            r"labels must be in \[0, 5\) or -100, got 0 to 5",
        ),
    ],
)
def test_what_does_not_fit_is_refused(hidden, weight, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels)
