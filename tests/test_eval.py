"""eval.py: one table, one JSON and every response, from any Hugging Face folder."""

import importlib
import json

import pytest
from conftest import SHARED_DATA

from drgrpo import distributed
from drgrpo.data import BENCHMARKS
from drgrpo.log import read_jsonl

eval_py = importlib.import_module("eval")


@pytest.fixture(autouse=True)
def no_group_left_behind():
    yield
    distributed.stop()


@pytest.fixture
def benchmarks(tmp_path):
    """Five made-up sets under the five names; the tiny model can do none of them."""
    for i, name in enumerate(BENCHMARKS):
        rows = [{"problem": f"What is {n} + {i}?", "answer": str(n + i)} for n in range(2 + i)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def run(*argv: str) -> None:
    eval_py.cli(list(argv))


def test_the_five_benchmark_table(warm_model, benchmarks, tmp_path, capsys):
    out = tmp_path / "out"
    run("--model", warm_model, "--data-dir", str(benchmarks), "--max-new-tokens", "24", "--out", str(out))
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in BENCHMARKS) and "average" in shown
    report = json.loads((out / "eval.json").read_text())
    assert list(report["benchmarks"]) == list(BENCHMARKS)
    assert [r["n"] for r in report["benchmarks"].values()] == [2, 3, 4, 5, 6]
    assert report["average"] == sum(r["accuracy"] for r in report["benchmarks"].values()) / 5
    assert report["settings"]["temperature"] == 0 and report["settings"]["template"] == "qwen_math"
    assert {"torch", "transformers", "math-verify"} <= report["versions"].keys()
    responses = read_jsonl(out / "responses.jsonl")
    assert len(responses) == 20 and all(0 < r["tokens"] <= 24 for r in responses)


def test_it_scores_what_training_scores(warm_model, tmp_path):
    """The held-out arithmetic problems, greedy: the number is the one that a run starts from."""
    from dataclasses import replace

    import train
    from drgrpo.config import RECIPES

    settings = {"model": warm_model, "out": str(tmp_path / "run"), "steps": 1, "eval_samples": 0}
    train.main(replace(RECIPES["tiny"](), **settings))
    distributed.stop()
    before, after = read_jsonl(tmp_path / "run" / "eval.jsonl")
    for model, expected in ((warm_model, before), (str(tmp_path / "run" / "hf"), after)):
        run("--model", model, "--benchmarks", "arithmetic_heldout", "--template", "arithmetic", "--max-new-tokens", "96",
            "--out", str(tmp_path / "eval"))  # fmt: skip
        scores = json.loads((tmp_path / "eval" / "eval.json").read_text())["benchmarks"]["arithmetic_heldout"]
        assert {k: scores[k] for k in ("accuracy", "n", "len_correct", "len_incorrect")} == {
            k: expected[k] for k in ("accuracy", "n", "len_correct", "len_incorrect")
        }


def test_several_samples_per_problem_are_averaged(warm_model, benchmarks, tmp_path):
    run("--model", warm_model, "--data-dir", str(benchmarks), "--benchmarks", "aime24", "--samples", "4", "--temperature", "1",
        "--max-new-tokens", "8", "--out", str(tmp_path / "out"))  # fmt: skip
    assert len(read_jsonl(tmp_path / "out" / "responses.jsonl")) == 8
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["benchmarks"]["aime24"]["n"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samples", "4"], "greedy answers would all be the same"),
        (["--template", "qwen"], "qwen_math"),
        (["--benchmarks", "aime24,amc24", "--data-dir", "DIR"], "amc24"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--grader", "strict"], "unknown --grader 'strict'"),
        (["--modle", "x"], "did you mean '--model'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_named(random_model, benchmarks, capsys, argv, message):
    argv = [str(benchmarks) if word == "DIR" else word for word in argv]
    with pytest.raises(SystemExit) as stop:
        run("--model", random_model, *argv)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line.startswith("error: ") and message in line


def test_the_real_aime24(warm_model, tmp_path, capsys):
    if not SHARED_DATA.exists():
        pytest.skip(f"the benchmarks are not at {SHARED_DATA}")
    run("--model", warm_model, "--benchmarks", "aime24", "--data-dir", str(SHARED_DATA / "eval"), "--max-new-tokens", "16",
        "--out", str(tmp_path))  # fmt: skip
    assert json.loads((tmp_path / "eval.json").read_text())["benchmarks"]["aime24"]["n"] == 30
