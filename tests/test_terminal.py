import logging

from difftune import terminal


def test_one_process_speaks_and_the_others_are_silent(monkeypatch, capsys):
    terminal.say(" 1.5", heading="loss")
    monkeypatch.setattr(terminal.rank_zero_only, "rank", 1)
    assert not terminal.is_first_rank()
    terminal.say("nobody hears this")
    assert capsys.readouterr().out == "loss 1.5\n"


def test_brackets_in_names_mean_nothing(capsys):
    terminal.say("run folder: [bold]x[/x]/[/]", heading="stage [red]")
    assert capsys.readouterr().out == "stage [red]run folder: [bold]x[/x]/[/]\n"


def test_our_messages_come_once_however_often_it_is_set_up(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("difftune"), "handlers", [])
    for _ in range(2):
        terminal.set_up_logging()
    assert len(logging.getLogger("difftune").handlers) == 1
    logging.getLogger("difftune.anything").info("said")
    logging.getLogger("lightning.pytorch").info("not said")
    out = capsys.readouterr().out
    assert out.count("said") == 1
