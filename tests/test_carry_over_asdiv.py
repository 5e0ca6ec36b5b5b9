"""The study of carry-over on a pretrained model: its commands, and what it reads of its runs."""

import json
import sys
from pathlib import Path

import pytest

from bench import harness
from bench.experiments import carry_over_asdiv
from drgrpo.config import parse_args
from drgrpo.run.files import append_jsonl

SHARES = (0.0, 0.15, 0.3)
ROWS = [
    {
        "step": step,
        "reward_mean": step / 10,
        "stale_frac": 0.25,
        "responses": 2,
        "seconds": {"rollout": 3.0, "total": 9.0, "eval": 1.0, "save": 1.0},
    }
    for step in range(1, 9)
]


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that were run. In place of each, its result is written."""
    ran = []

    def made_up(command: list[str], log: str) -> None:
        ran.append(command)
        flags = dict(flag[2:].split("=", 1) for flag in command[1:])
        out = Path(flags["out"])
        out.mkdir(parents=True)
        if command[0] == "train.py":
            append_jsonl(out / "metrics.jsonl", ROWS)
            return
        accuracy = 0.5 + (0.01 if "0.3" in flags["model"] else 0.0)
        columns = {"accuracy": accuracy, "len_correct": 6.0, "len_incorrect": 7.0}
        (out / "eval.json").write_text(json.dumps({"benchmarks": {"file": columns}}))

    monkeypatch.setattr(harness, "run_on_one_thread", made_up)
    return ran


def test_every_arm_is_trained_and_evaluated_once(commands, monkeypatch, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):  # a folder with a model has them
        (tmp_path / name).write_text("{}")
    folders = f"--runs {tmp_path / 'runs'} --out {tmp_path}"
    line = f"study --model {tmp_path} --data my.jsonl --seeds 2 {folders}"
    monkeypatch.setattr(sys, "argv", line.split())
    carry_over_asdiv.main()
    assert [command[0] for command in commands] == ["train.py", "eval.py"] * 6
    configs = [parse_args(command[1:]) for command in commands[::2]]
    assert [(c.seed, c.carry_over) for c in configs] == [(s, c) for s in (0, 1) for c in SHARES]
    assert {c.train_data for c in configs} == {"my.jsonl[25%:75%]"}
    arms = json.loads((tmp_path / "carry_over_asdiv.json").read_text())["arms"]
    assert arms["0"]["runs"]["accuracy"] == [0.5, 0.5] and "against_0" not in arms["0"]
    assert arms["0.3"]["against_0"]["accuracy"]["mean"] == pytest.approx(0.01)
    assert arms["0"]["runs"]["reward"] == pytest.approx([0.75] * 2), "the last two of eight steps"
    assert arms["0"]["runs"]["step_s"] == [7, 7] and arms["0"]["runs"]["rollout_s"] == [3, 3]
    assert "| 0.3 | 0.510 (0.510–0.510) | 6.00 (6.00–6.00) | 7.00" in capsys.readouterr().out
    carry_over_asdiv.main()
    assert len(commands) == 12, "finished runs are not run again"
