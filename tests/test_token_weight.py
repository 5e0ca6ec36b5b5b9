"""The weight of a token, read off the trainer's own gradient, is the formula's: in every objective,
at every length and std."""

import json
import sys

import pytest

from bench.experiments import token_weight


@pytest.fixture(scope="module")
def result():
    return token_weight.measure()


@pytest.mark.parametrize("algo", token_weight.OBJECTIVES)
def test_the_loss_weighs_every_token_as_its_formula_says(result, algo):
    assert token_weight.worst(result["by_length"][algo] + result["by_std"][algo]) < 1e-4


def spread(rows: list[dict]) -> float:
    lightest = [row["low"] for row in rows]
    return max(lightest) / min(lightest)


def test_only_the_mean_per_response_depends_on_the_length(result):
    ratios = {algo: spread(rows) for algo, rows in result["by_length"].items()}
    expected = {"drgrpo": 1, "dapo": 1, "grpo": 750, "grpo_length": 750}
    assert ratios == pytest.approx(expected, rel=1e-3)


def test_only_the_division_by_the_std_depends_on_how_many_are_right(result):
    ratios = {algo: spread(rows) for algo, rows in result["by_std"].items()}
    expected = {"drgrpo": 1, "grpo_length": 1, "grpo": 1.512, "dapo": 1.512}
    assert ratios == pytest.approx(expected, rel=1e-3)


def test_it_leaves_a_table_a_figure_and_a_json(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(token_weight, "measure", lambda: result)
    monkeypatch.setattr(sys, "argv", ["token_weight", "--out", str(tmp_path)])
    token_weight.main()
    printed = capsys.readouterr().out.strip().splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "token_weight.json").read_text())
    assert (tmp_path / "token_weight.png").stat().st_size > 10_000
    table = [line for line in printed if line.startswith("| ")]
    assert len(table) == 2 + len(token_weight.OBJECTIVES)
