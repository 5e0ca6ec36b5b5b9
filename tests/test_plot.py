"""Figures of one run and of several, also of a run without evaluation or without a right answer."""

import json

import pytest

from drgrpo.run.plot import curves, plot, step_time
from drgrpo.types import UserError


def write_run(path, algo="drgrpo", evaluated=True, correct=18.0):
    path.mkdir()
    rows = [
        {
            "step": s,
            "algo": algo,
            "reward_mean": s / 10,
            "response_len_correct": correct,
            "response_len_incorrect": 30.0 + s,
            "seconds": {"rollout": 0.2, "old": 0.1, "train": 0.3, "total": 0.6},
        }
        for s in (1, 2, 3)
    ]
    evals = [
        {"step": s, "benchmark": "b", "temperature": t, "accuracy": 0.5}
        for s in (0, 3)
        for t in (0.0, 1.0)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evals * evaluated))
    return path


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_one_run_and_two(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", "grpo")
    for runs in ([a], [a, b]):
        figures = plot(runs)
        assert [f.name for f in figures] == ["curves.png", "time.png"] and all(map(is_png, figures))


def test_every_curve_holds_all_of_its_steps(tmp_path):
    lines = [axis.get_lines() for axis in curves([write_run(tmp_path / "a")]).axes]
    steps = [[list(line.get_xdata()) for line in axis] for axis in lines]
    assert steps == [[[1, 2, 3]], [[0, 3]] * 2, [[1, 2, 3]] * 2], (
        "greedy and sampled, right and wrong"
    )


def test_a_run_without_evaluation_or_right_answers(tmp_path):
    assert all(map(is_png, plot([write_run(tmp_path / "a", evaluated=False, correct=None)])))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics.jsonl"):
        plot([tmp_path])


def test_the_seconds_of_every_phase_are_in_the_picture(tmp_path):
    (axis,) = step_time(write_run(tmp_path / "a")).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "rollout",
        "old",
        "train",
    ]
