import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.ops import Documents, diff_attention
from difftune.ops.triton import forward
from difftune.ops.triton.attention import triton_diff_attention
from difftune.verification.equation import make_inputs
from tests.ops.triton.conftest import among_nans

SHAPE = (1, 13, 13, 2, 1, 32)


def leaves(device, kind="v1", lam="layer", norm=True, dtype=torch.float32, shape=SHAPE):
    return [x.to(device).requires_grad_() for x in make_inputs(shape, kind, lam, dtype, norm)]


def attend(q, k, v, lam, weight=None, **options):
    return diff_attention(q, k, v, lam, norm_weight=weight, backend="triton", **options)


@pytest.mark.parametrize(
    "utility", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_the_operator_keeps_what_torch_asks_of_operators(device, utility):
    arguments = (*leaves(device), None, None, 0, True, 0.2, 1e-5)
    operator = torch.ops.difftune.diff_attention_forward.default
    assert torch.library.opcheck(operator, arguments, test_utils=utility) == {utility: "SUCCESS"}


def test_the_operator_takes_documents_and_padding(device):
    q, k, v, lam = (x.detach() for x in leaves(device, norm=False))
    cu_seqlens = torch.tensor([0, 7, 13], dtype=torch.int32, device=device)
    mask = torch.arange(13, device=device)[None] > 4
    utilities = ("test_schema", "test_faketensor")
    for masks in ((cu_seqlens, None, 7), (None, mask, 0)):
        arguments = (q, k, v, lam, None, *masks, True, 0.2, 1e-5)
        operator = torch.ops.difftune.diff_attention_forward.default
        found = torch.library.opcheck(operator, arguments, test_utils=utilities)
        assert found == dict.fromkeys(utilities, "SUCCESS")


def test_torch_compile_sees_it_whole(device):
    inputs = leaves(device)
    compiled = torch.compile(lambda *x: attend(*x).square().sum(), fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*inputs), inputs)
    for ours, plain in zip(gradients, torch.autograd.grad(attend(*inputs).square().sum(), inputs), strict=True):
        torch.testing.assert_close(ours, plain)


def test_selective_checkpointing_can_keep_its_outputs(device, monkeypatch):
    calls = []
    launch = forward.forward
    monkeypatch.setattr(forward, "forward", lambda problem: calls.append(1) or launch(problem))

    def policy(ctx, operator, *args, **kwargs):
        ours = operator == torch.ops.difftune.diff_attention_forward.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    inputs = leaves(device)
    context_fn = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(attend, *inputs, use_reentrant=False, context_fn=context_fn).sum().backward()
    assert len(calls) == 1 and all(x.grad is not None for x in inputs)
    checkpoint(attend, *inputs, use_reentrant=False).sum().backward()
    assert len(calls) == 3, "without the policy the forward runs twice"


@pytest.mark.parametrize(("kind", "limit"), [("v1", 12), ("v2", 6)])
def test_saved_activations_of_a_head_are_at_most_twelve_times_tokens_times_dims(kind, limit, device):
    B, T, H, D = 1, 20, 2, 32
    inputs = leaves(device, kind, norm=kind == "v1", shape=(B, T, T, H, H, D))
    projection = torch.nn.Linear(H * inputs[2].shape[-1], 8, bias=False, device=device)
    saved = {}

    def keep(x):
        saved[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        projection(attend(*inputs).flatten(2)).sum().backward()
    heads = [x for x in saved.values() if x.ndim >= 3 and x.shape[-1] != T]
    statistics = [x for x in saved.values() if x.ndim == 4 and x.shape[-1] == T]
    assert sum(x.numel() for x in heads) <= limit * B * T * D * H
    assert sum(x.numel() for x in statistics) == 2 * B * T * H, "two numbers a token and head"


def layouts():
    """Pairs of (name, function from dense q, k, v to views of the same numbers in other memory)."""
    return {
        "rows apart": lambda q, k, v: (among_nans(q), among_nans(k), among_nans(v)),
        # A cache has the heads before the positions, and K1 and K2 of a group side by side.
        "cache": lambda q, k, v: (
            q,
            k.flatten(3).transpose(1, 2).contiguous().transpose(1, 2).unflatten(3, k.shape[3:]),
            v.transpose(1, 2).contiguous().transpose(1, 2),
        ),
        # transformers' DiffLlama: all positive heads, then all negative ones, before the positions.
        "half-split": lambda q, k, v: (
            *(x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4) for x in (q, k)),
            v,
        ),
    }


@pytest.mark.parametrize("layout", layouts())
def test_strided_inputs_are_read_where_they_lie(layout, device, monkeypatch):
    q, k, v, lam = (x.detach() for x in leaves(device, norm=False, shape=(2, 9, 17, 2, 2, 32)))
    expected = attend(q, k, v, lam)
    views = layouts()[layout](q, k, v)
    assert any(not x.is_contiguous() for x in views)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # a copy would fail
    torch.testing.assert_close(attend(*views, lam), expected, rtol=0, atol=0)


def test_gradients_of_strided_inputs_are_those_of_dense_ones(device):
    q, k, v, lam = leaves(device, norm=False, shape=(2, 9, 17, 2, 2, 32))
    dense = torch.autograd.grad(attend(q, k, v, lam).square().sum(), [q, k, v])
    views = [among_nans(x.detach()).requires_grad_() for x in (q, k, v)]
    strided = torch.autograd.grad(attend(*views, lam).square().sum(), views)
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_columns_that_are_apart_are_copied(device):
    q, k, v, lam = (x.detach() for x in leaves(device, norm=False))
    apart = torch.stack([q, q], dim=-1)[..., 0]
    assert apart.stride(-1) == 2
    torch.testing.assert_close(attend(apart, k, v, lam), attend(q, k, v, lam), rtol=0, atol=0)


def test_autocast_decides_the_dtype(device):
    q, k, v, lam = (x.detach() for x in leaves(device, norm=False))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = attend(q, k, v, lam)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), lam), rtol=0, atol=0)


def test_a_constant_weight_receives_no_gradient_and_a_frozen_lambda_neither(device):
    q, k, v, lam, weight = leaves(device)
    attend(q, k, v, lam.detach(), weight.detach()).sum().backward()
    assert q.grad is not None and lam.grad is None and weight.grad is None


def test_documents_prepared_once_serve_the_kernels(device):
    q, k, v, lam = (x.detach() for x in leaves(device, norm=False))
    cu_seqlens = torch.tensor([0, 7, 13], device=device)
    options = {"causal": True, "key_padding_mask": None, "scale": 32**-0.5, "norm_weight": None, "norm_eps": 0.0}
    direct = triton_diff_attention(q, k, v, lam, documents=Documents(cu_seqlens), **options)
    torch.testing.assert_close(attend(q, k, v, lam, cu_seqlens=cu_seqlens), direct, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2"])
def test_a_model_under_fsdp2_has_the_gradients_of_one_that_is_not_sharded(device, kind, tmp_path):
    """Parameters as DTensors, gathered around each block, whose backward calls the operator's own."""
    shape = {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DiffTransformerConfig(vocab_size=17, attention=kind, head_dim=32, attention_backend="triton", **shape)
    plain = DiffTransformerForCausalLM(config).to(device)
    sharded = copy.deepcopy(plain)
    tokens = torch.arange(12, device=device)[None] % 17
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device, (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (plain, sharded):
            model(tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
    finally:
        dist.destroy_process_group()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)
