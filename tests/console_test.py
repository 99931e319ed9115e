"""What a person sees of rounds: a bar on a terminal, lines elsewhere, nothing from other processes."""

import logging
import sys

import pytest

from fedjax_peft import console, processes

LINES = [
    {"round": 3, "loss": 0.5, "tokens_per_second": 1234.0, "seconds": 2.0},
    {"round": 4, "loss": None, "tokens_per_second": 10.0, "seconds": 2.0},
]


def shown(terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with console.progress(6, 3) as show:
        for line in LINES:
            show(line)


def test_without_a_terminal_every_round_is_a_line(monkeypatch, caplog, capsys):
    with caplog.at_level(logging.INFO):
        shown(False, monkeypatch)
    assert [record.getMessage() for record in caplog.records] == [
        "round 4/6  loss 0.5000  1234 tokens/s  2.0 s  4 s left",
        "round 5/6  loss -  10 tokens/s  2.0 s  2 s left",
    ]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_one_bar(monkeypatch, caplog, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with caplog.at_level(logging.INFO):
        shown(True, monkeypatch)
    out, bar = capsys.readouterr()
    assert not out and not caplog.records
    assert "5/6" in bar and "10 tokens/s" in bar and "left" in bar


@pytest.mark.parametrize("terminal", [False, True])
def test_other_processes_say_nothing(terminal, monkeypatch, caplog, capsys):
    monkeypatch.setattr(processes, "first", lambda: False)
    with caplog.at_level(logging.INFO):
        shown(terminal, monkeypatch)
    assert not caplog.records and capsys.readouterr() == ("", "")
