import json

import pytest
import torch

from benchmarks import attention, contenders

ARGUMENTS = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--rounds", "1", "--tokens", "16"]
SMALL = [*ARGUMENTS, "--lengths", "16", "--head-dims", "8", "--heads", "2", "--kv-ratio", "2"]


def test_table_has_every_case_and_the_file_says_where(capsys, tmp_path):
    attention.main([*SMALL, "--json", str(tmp_path / "new" / "found.json")])
    printed = capsys.readouterr().out
    for kind in ("fwd ", "fwd+bwd", "decode"):
        assert printed.count(f"| {kind}") == 2 * 3
    assert "DiffLlama" in printed and "vanilla SDPA" in printed
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert {"device", "torch", "commit", "transformers"} <= set(found["environment"])
    assert len(found["results"]) == 18 and not found["skipped"]
    assert all(len(result["ms"]) == 1 and result["ms"][0] > 0 for result in found["results"])


def test_nothing_is_printed_for_a_wrong_result(monkeypatch, capsys):
    right = contenders.diff_attention

    def wrong(*args, backend, **options):
        out = right(*args, backend=backend, **options)
        return out if backend == "reference" else 1.01 * out

    monkeypatch.setattr(contenders, "diff_attention", wrong)
    with pytest.raises(SystemExit, match="difftune sdpa is wrong"):
        attention.main(SMALL)
    assert "|" not in capsys.readouterr().out


def failing(*leaves):
    raise RuntimeError("no kernel fits\nof this GPU")


def test_what_torch_cannot_compile_is_named_and_the_rest_measured(monkeypatch, capsys):
    monkeypatch.setattr(
        attention,
        "contenders",
        lambda case, compiled: {
            **contenders.contenders(case, compiled=False),
            "FlexAttention, d_v = 2 d": contenders.Contender(contenders._ours_layout, failing),
        },
    )
    monkeypatch.setattr(contenders, "_flex", lambda length: failing)
    found = attention.main([*SMALL, "--passes", "fwd+bwd"])
    assert found["skipped"] == [
        f"FlexAttention, d_v = 2 d, d=8, {ratio} heads a group: RuntimeError: no kernel fits" for ratio in (1, 2)
    ]
    assert {result["what"] for result in found["results"]} == {"DiffLlama", "difftune sdpa", contenders.VANILLA}
    assert "skipped: FlexAttention" in capsys.readouterr().out


def test_an_error_of_ours_is_no_skip(monkeypatch):
    monkeypatch.setattr(
        contenders, "_ours", lambda backend, right=contenders._ours: failing if backend == "sdpa" else right(backend)
    )
    monkeypatch.setattr(contenders, "backends", lambda case: ["sdpa"])
    with pytest.raises(RuntimeError, match="no kernel fits"):
        attention.main(SMALL)


def test_what_does_not_fit_the_budget_is_named(capsys):
    found = attention.main([*SMALL, "--budget-s", "-1"])
    assert not found["results"] and len(found["skipped"]) == 6
    assert "skipped: fwd at 16, d=8, 2 groups: no time left" in capsys.readouterr().out


def test_defaults_for_a_gpu_name_the_sizes_of_a_model():
    preset = attention.defaults(cuda=True)
    assert set(preset["lengths"]) == {2048, 4096, 8192, 16384, 32768, 65536} and preset["head_dims"] == [64, 128]


def test_true_count_of_products():
    case = contenders.Case(2, 8, 8, 3, 3, 4, torch.bfloat16, "cpu")
    pairs = 2 * 3 * 8 * 8 // 2
    # Two maps of d multiply-adds, and two products with values of 2 d; a multiply-add is 2 FLOP.
    assert case.flops(backward=False, vanilla=False) == pairs * 2 * (2 * 4 + 2 * 2 * 4)
    assert case.flops(backward=False, vanilla=True) == pairs * 2 * (2 * 4 + 2 * 4)
    assert case.cache_bytes == 2 * 3 * 8 * (2 * 4 + 2 * 4) * 2


def test_saved_activations_of_the_kernel_and_of_diffllama():
    """In elements of N d: q, k, v, output, output of the negative map, normed output: 12 (DiffLlama: 20)."""
    pytest.importorskip("triton")
    case = contenders.Case(1, 20, 20, 1, 1, 64, torch.float32, "cpu")
    ways = contenders.contenders(case, compiled=False)
    if "difftune triton" not in ways:
        pytest.skip("the interpreter is off")
    # Beside them a few numbers a token: two log-sum-exps, weight of the norm.
    few = 0.5
    assert contenders.saved_per_head(ways["difftune triton"], case) <= 12 + few
    assert contenders.saved_per_head(ways[contenders.BASELINE], case) >= 20
    assert contenders.saved_per_head(ways[contenders.VANILLA], case) <= 8 + few
