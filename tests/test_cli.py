"""The command line of a dataclass: what is given is used, what is wrong is named with the nearest
valid thing."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from drgrpo.run.cli import Parser, hard_exit, user_errors
from drgrpo.types import UserError, comma_list


@dataclass
class Settings:
    name: str
    """who"""

    # speed
    pace: Literal["slow", "fast"] = "slow"
    """how fast, 100 % of the time"""
    loud: bool = False
    """shout"""
    steps_per_mile: int = 2000
    """count"""


def parse(*argv):
    parser = Parser(Settings)
    parser.refused = {"--teleport": "physics forbids it"}
    return parser.parse(list(argv))


def test_only_given_fields_are_returned_with_their_types():
    given = parse("--name", "ann", "--steps-per-mile", "3", "--loud", "false")
    assert given == {"name": "ann", "steps_per_mile": 3, "loud": False}


@pytest.mark.parametrize("argv", [["--loud"], ["--loud", "yes"], ["--loud=1"]], ids=str)
def test_a_switch_needs_no_value(argv):
    assert parse("--name", "ann", *argv)["loud"] is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --name"),
        (["--name", "ann", "--pacee", "fast"], "did you mean '--pace'"),
        (["--name", "ann", "--pac", "fast"], "did you mean '--pace'"),
        (["--name", "ann", "--loud", "maybe"], "neither true nor false"),
        (["--name", "ann", "--steps-per-mile", "x"], "invalid int value: 'x'"),
        (["--name", "ann", "stray"], "unexpected argument 'stray'"),
        (["--name", "ann", "--teleport=1"], "--teleport does not exist: physics forbids it"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_named_with_the_way_out(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value)


def test_help_shows_every_field_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "\nwhat:\n" not in shown and "\nspeed:\n" in shown
    assert "--pace {slow,fast}" in shown and "100 % of the time (slow)" in shown


def test_a_comma_list_has_each_word_once():
    assert comma_list(" a, b,a,,c ") == ["a", "b", "c"]
    assert comma_list("") == []


def test_a_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise UserError("no such thing; use that thing")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; use that thing\n"


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (RuntimeError("broken"), 1, "Traceback (most recent call last)"),
        (KeyboardInterrupt(), 1, "Traceback (most recent call last)"),
        (UserError("no such thing"), 2, "error: no such thing"),
    ],
    ids=["bug", "Ctrl-C", "mistake"],
)
def test_one_of_several_processes_leaves_hard_once_its_error_is_printed(
    monkeypatch, capsys, error, status, shown
):
    left = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(os, "_exit", lambda status: left.append((status, capsys.readouterr().err)))
    with hard_exit(), user_errors():
        raise error
    ((left_with, printed_before),) = left
    assert left_with == status and printed_before.startswith(shown)
    assert str(error) in printed_before
    assert ("Traceback" in printed_before) == (status == 1), "a mistake has no traceback"


def test_a_single_process_leaves_in_good_order(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("it left hard"))
    with pytest.raises(RuntimeError, match="broken"), hard_exit(), user_errors():
        raise RuntimeError("broken")
    with hard_exit():
        pass
