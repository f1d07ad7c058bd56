import subprocess
import sys

import pytest
import torch

from difftune.ops.triton.launch import Problem, architecture, is_interpreted, rows_in_memory
from difftune.ops.triton.tiles import SMALL
from tests.conftest import ROOT


def problem(lam, **changed):
    q, k, v = torch.randn(2, 6, 4, 2, 32), torch.randn(2, 9, 2, 2, 32), torch.randn(2, 9, 2, 64)
    arguments = {
        "norm_weight": None, "cu_seqlens": None, "key_padding_mask": None, "max_length": 0, "causal": True,
        "scale": 2.0, "norm_eps": 0.0, **changed,
    }  # fmt: skip
    return Problem(q, k, v, lam, **arguments)


@pytest.mark.parametrize(
    ("lam", "strides", "token"),
    [(torch.rand(()), (0, 0, 0), False), (torch.rand(4), (0, 0, 1), False), (torch.rand(2, 6, 4), (24, 4, 1), True)],
    ids=["layer", "head", "token"],
)
def test_lambda_of_every_shape_is_read_by_strides(lam, strides, token):
    arguments = problem(lam).arguments
    assert tuple(arguments[f"stride_l{axis}"] for axis in "bth") == strides
    assert arguments["LAM_TOKEN"] == token and arguments["GROUP"] == 2 and not arguments["SHARED"]
    assert arguments["scale"] == pytest.approx(2 / torch.log(torch.tensor(2.0)).item())


def test_sequences_are_rows_or_documents():
    dense, packed = (
        problem(torch.rand(())),
        problem(torch.rand(()), cu_seqlens=torch.tensor([0, 4, 6, 12]), max_length=6),
    )
    assert (dense.sequences, dense.max_queries, dense.max_keys) == (2, 6, 9)
    assert (packed.sequences, packed.max_queries, packed.max_keys) == (3, 6, 6)
    assert packed.arguments["VARLEN"] and dense.out_shape == (2, 6, 4, 64)


def test_only_what_does_not_lie_in_rows_is_copied():
    x = torch.randn(2, 3, 4)
    assert rows_in_memory(x.transpose(0, 1)).data_ptr() == x.data_ptr()
    assert rows_in_memory(x.transpose(1, 2)).data_ptr() != x.data_ptr()


def test_architectures_without_kernels_have_no_tiles(monkeypatch):
    assert not is_interpreted() or architecture("cpu", None) == SMALL
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert architecture("cpu", None) == -1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert architecture("cuda", 0) == 90


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, torch, difftune, difftune.ops; from difftune.ops import diff_attention\n"
        "x = torch.randn(1, 3, 2, 2, 8); diff_attention(x, x, torch.randn(1, 3, 2, 16), torch.tensor(0.1))\n"
        "print([name for name in sys.modules if name == 'triton' or name.startswith('difftune.ops.triton')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
