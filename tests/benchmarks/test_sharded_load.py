from benchmarks import sharded_load
from tests.ranks import run_ranks


def test_a_rank_of_two_holds_less_than_three_quarters_of_the_model(tmp_path):
    size = sharded_load.write_model(tmp_path, hidden_size=512, layers=10, vocab_size=4000)
    assert size > 180e6, "large beside what libraries allocate meanwhile"
    done = run_ranks("benchmarks.sharded_load", "--child", sharded_load.SHARDED, "--folder", str(tmp_path))
    peaks = sharded_load.peaks_of(done.output)
    assert len(peaks) == 2
    assert max(peaks) * 2**30 < 0.75 * size


def test_the_table_names_both_ways(capsys, monkeypatch):
    peaks = {sharded_load.WHOLE: [0.02], sharded_load.SHARDED: [0.01, 0.015]}
    monkeypatch.setattr(sharded_load, "_run", lambda kind, folder, ranks: peaks[kind])
    sharded_load.main(["--layers=1", "--hidden-size=32"])
    shown = capsys.readouterr().out
    assert "| load_model, one process | 0.02 " in shown
    assert "| shard by shard, 2 ranks | 0.01 " in shown or "| shard by shard, 2 ranks | 0.02 " in shown
