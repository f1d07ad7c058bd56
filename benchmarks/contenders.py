"""Ways to compute one differential attention, each from inputs in its own layout; what they cost by the count.

All take ``q (B, T, H, 2, D)``, ``k (B, S, G, 2, D)``, ``v (B, S, G, 2 D)`` and lambda, and end with the norm over each
head and its constant factor: from rotated projections to what the output projection reads.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.baselines import diffllama_attention, to_diffllama_layout
from benchmarks.common import in_one_line, require_close
from difftune.ops import diff_attention

LAM, FACTOR, EPS = 0.5, 0.8, 1e-5
BASELINE, VANILLA = "DiffLlama", "vanilla SDPA, same parameters"
CHECK_LENGTH = 96
# In low precision the others round the two outputs before they subtract, and the norm magnifies it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}


class Case(NamedTuple):
    """Sizes of one attention; ``queries`` tokens a row over ``length`` keys."""

    rows: int
    queries: int
    length: int
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    device: str

    def inputs(self) -> list[torch.Tensor]:
        """Random q, k, v in our layout."""
        shapes = [
            (self.rows, self.queries, self.heads, 2, self.head_dim),
            (self.rows, self.length, self.groups, 2, self.head_dim),
            (self.rows, self.length, self.groups, 2 * self.head_dim),
        ]
        return [torch.randn(shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def flops(self, backward: bool, vanilla: bool) -> float:
        """Products that are needed under the causal mask, in FLOP; a backward recomputes both maps, once.

        In units of N^2 d a head: two maps 4, two products with values of 2 d 8; backward two maps 4, dP 4, dV 4, dQ 4,
        dK 4. Vanilla attention of as many parameters has two heads of d: 8 and 20.
        """
        units = (8 if vanilla else 12) + (20 if backward else 0)
        return units * 0.5 * self.queries * self.length * self.head_dim * self.heads * self.rows

    @property
    def cache_bytes(self) -> int:
        """Keys and values that a step of decoding must read."""
        return 4 * self.head_dim * self.groups * self.length * self.rows * self.dtype.itemsize


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Contender(NamedTuple):
    """A way, from its own layout."""

    layout: Callable[..., Sequence[torch.Tensor]]
    attend: Attend


def contenders(case: Case, compiled: bool) -> dict[str, Contender]:
    """What runs on the device of ``case``, the baseline first; ``compiled`` asks for those that torch compiles too."""
    found = {BASELINE: Contender(_diffllama_layout, _diffllama)}
    if compiled:
        found[f"{BASELINE}, compiled"] = Contender(_diffllama_layout, _compiled_diffllama())
        # On the CPU FlexAttention has no backward; for decoding it would need masks of its own.
        if case.device == "cuda" and case.queries == case.length:
            found["FlexAttention, d_v = 2 d"] = Contender(_ours_layout, _flex(case.length))
    for backend in backends(case):
        name = "flash-attn, 4 calls" if backend == "flash" else f"difftune {backend}"
        found[name] = Contender(_ours_layout, _ours(backend))
    if case.device == "cuda" and case.queries == case.length and importlib.util.find_spec("flex_head_fa"):
        found["flex_head_fa, 2 calls"] = Contender(_ours_layout, _flex_head_fa)
    found[VANILLA] = Contender(_diffllama_layout, _vanilla)
    return found


def backends(case: Case) -> list[str]:
    """Our backends that take this device, dtype and shape, fastest to be expected last."""
    inputs = case._replace(rows=1, queries=1, length=1, heads=1, groups=1).inputs()
    found = []
    for backend in ("sdpa", "flash", "triton"):
        # A named backend says itself what it lacks.
        with contextlib.suppress(ValueError, ImportError):
            _ours(backend)(*inputs)
            found.append(backend)
    return found


def check(case: Case, ways: dict[str, Contender], backward: bool) -> dict[str, str]:
    """Leave with an error unless every way gives the output, and the gradients, of the equation at a short length.

    Returns those of others that fail here, and why: what torch compiles depends on its version and on the GPU.
    """
    lengths = {"queries": min(case.queries, CHECK_LENGTH), "length": min(case.length, CHECK_LENGTH)}
    short = case._replace(rows=1, groups=1, heads=case.heads // case.groups, **lengths)
    inputs = short.inputs()
    exact = [x.double().requires_grad_(backward) for x in inputs]
    expected = _ours("reference")(*exact)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, exact, cotangent) if backward else ()
    failed = {}
    for name, way in ways.items():
        if name == VANILLA:
            continue
        leaves = [x.detach().requires_grad_(backward) for x in way.layout(*inputs)]
        try:
            attend = _flex(short.length) if name.startswith("FlexAttention") else way.attend
            with torch.set_grad_enabled(backward):
                out = attend(*leaves)
            actual = torch.autograd.grad(out, leaves, cotangent.to(out.dtype)) if backward else ()
        except Exception as error:
            if name == BASELINE or name.startswith("difftune"):
                raise
            failed[name] = in_one_line(error)
            continue
        require_close(name, out.double(), expected, TOLERANCE[case.dtype])
        if backward:
            for letter, a, e in zip("qkv", actual, way.layout(*gradients), strict=True):
                require_close(f"{name}, gradient of {letter}", a.double(), e, TOLERANCE[case.dtype])
    return failed


def saved_per_head(way: Contender, case: Case) -> float:
    """What is held for the backward, with what the output projection holds, in elements of ``N d`` a diff head."""
    leaves = [x.requires_grad_() for x in way.layout(*case.inputs())]
    storages: dict[int, int] = {}
    weight = torch.empty(1, 2 * case.head_dim * case.heads, dtype=case.dtype, device=case.device, requires_grad=True)

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = F.linear(way.attend(*leaves).flatten(2), weight)
    held = sum(storages.values())
    del out
    return held / case.dtype.itemsize / (case.rows * case.queries * case.heads * case.head_dim)


def _ours_layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q.clone(), *_in_cache(q, k.clone(), v.clone())


def _diffllama_layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v = to_diffllama_layout(q, k, v)
    return q, *_in_cache(q, k, v)


def _in_cache(q: torch.Tensor, *cached: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values as they lie in a cache, tokens of a group one after another, where queries are fewer."""
    if q.shape[1] == cached[0].shape[1]:
        return cached
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in cached)


def _norm_weight(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.full((size,), FACTOR, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _lam(x: torch.Tensor) -> torch.Tensor:
    """Lambda, learned where queries are: what its gradient needs is held too."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full((), LAM, dtype=dtype, device=x.device, requires_grad=x.requires_grad)


def _ours(backend: str) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weight = _norm_weight(q, v.shape[-1])
        return diff_attention(q, k, v, _lam(q), norm_weight=weight, norm_eps=EPS, backend=backend)

    return attend


def _diffllama(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = diffllama_attention(q, k, v, _lam(q).to(q.dtype))
    return FACTOR * F.rms_norm(out, out.shape[-1:], eps=EPS)


@cache
def _compiled_diffllama() -> Attend:
    return torch.compile(_diffllama, dynamic=False)


def _vanilla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = q.shape[2] == k.shape[2]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).unflatten(2, (-1, 2)).flatten(3)


def _flex(length: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cuda")
    flex = _compiled_flex()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        v = v.transpose(1, 2)
        maps = [
            flex(q[..., p, :].transpose(1, 2), k[..., p, :].transpose(1, 2), v, block_mask=mask, enable_gqa=True)
            for p in (0, 1)
        ]
        return _difference(*(x.transpose(1, 2) for x in maps))

    return attend


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_head_fa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flex_head_fa import flash_attn_func

    return _difference(*(flash_attn_func(q[..., p, :], k[..., p, :], v, causal=True) for p in (0, 1)))


def _difference(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    out = positive - _lam(positive.detach()).to(positive.dtype) * negative
    return FACTOR * F.rms_norm(out, out.shape[-1:], eps=EPS)
