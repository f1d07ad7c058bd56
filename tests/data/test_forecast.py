import pytest

from difftune.data.forecast import Forecast


def test_hours_follow_from_tokens_and_speed():
    forecast = Forecast(1_000_000, 400_000, 500, 8_000, tokens_per_s=2_000.0, peak_memory_gib=1.5, devices=4)
    assert forecast.hours == pytest.approx(500 * 8_000 / 8_000 / 3600) and forecast.epochs == pytest.approx(4.0)
    shown = forecast.text()
    assert "4.00 passes" in shown and "0.14 hours" in shown and "1.50 GiB" in shown and "2,000 tokens/s" in shown


def test_what_is_not_known_is_not_told():
    forecast = Forecast(1_000, 400, None, 100)
    assert forecast.hours is None and forecast.epochs is None
    assert "hours" not in forecast.text() and "GiB" not in forecast.text() and "steps" not in forecast.text()


def test_of_a_stream_no_epoch_is_told():
    forecast = Forecast(1_000, 400, 500, 100, tokens_per_s=10.0, complete=False)
    assert forecast.epochs is None and forecast.hours is not None
    assert "epoch" not in forecast.text() and "passes" not in forecast.text() and "500 steps" in forecast.text()
