import pytest

from benchmarks import step

ARGUMENTS = ["--device=cpu", "--dtype=float32", "--layers=1", "--hidden-size=32", "--heads=2", "--intermediate-size=32"]
ARGUMENTS += ["--vocab-size=32", "--rows=1", "--seq-len=8", "--steps=1", "--no-compile"]


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch):
    monkeypatch.setattr(step, "backends", lambda case: ["sdpa"])


def test_all_have_one_loss(capsys):
    found = step.main(ARGUMENTS)
    assert [result["what"] for result in found["results"]] == ["DiffLlama", "DiffLlama, patched: sdpa", "difftune sdpa"]
    losses = [result["loss"] for result in found["results"]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert "| difftune sdpa" in capsys.readouterr().out


def test_nothing_is_printed_for_a_wrong_loss(monkeypatch, capsys):
    right = step.measure

    def wrong(name, *args):
        result = right(name, *args)
        return result | {"loss": float("nan")} if name == "difftune sdpa" else result

    monkeypatch.setattr(step, "measure", wrong)
    with pytest.raises(SystemExit, match="difftune sdpa is wrong: loss nan"):
        step.main(ARGUMENTS)
    assert "|" not in capsys.readouterr().out


def test_what_torch_cannot_compile_is_named_and_the_rest_measured(monkeypatch):
    def failing(model, **options):
        raise RuntimeError("no kernel fits\nof this GPU")

    monkeypatch.setattr(step.torch, "compile", failing)
    found = step.main([*ARGUMENTS, "--compile"])
    assert found["skipped"] == ["DiffLlama, compiled: RuntimeError: no kernel fits"]
    assert [result["what"] for result in found["results"]] == ["DiffLlama", "DiffLlama, patched: sdpa", "difftune sdpa"]
