"""eval.py makes one table, one JSON and every response from any Hugging Face folder. It continues
where it was interrupted, and it grades, compares and analyzes without a model."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT, SHARED_DATA
from drgrpo import config, distributed
from drgrpo.config import RECIPES
from drgrpo.data import BENCHMARKS
from drgrpo.engine_torch import TorchEngine
from drgrpo.evaluation import run as run_module
from drgrpo.evaluation.config import Command, EvalConfig, parse_args
from drgrpo.rollout import sample_seed
from drgrpo.run.cli import user_errors
from drgrpo.run.files import append_jsonl, read_jsonl
from drgrpo.types import Problem, Sampling
from rows import response_row

eval_py = importlib.import_module("eval")


@pytest.fixture
def benchmarks(tmp_path) -> Path:
    """Five made-up sets under the five names. The tiny model can solve none of them."""
    for i, name in enumerate(BENCHMARKS):
        rows = [{"problem": f"What is {n} + {i}?", "answer": str(n + i)} for n in range(2 + i)]
        append_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def run(command: str) -> None:
    with user_errors():
        eval_py.cli(parse_args(command.split()))


def report_of(folder: Path) -> dict:
    return json.loads((folder / "eval.json").read_text())


def test_the_five_benchmark_table(warm_model, benchmarks, tmp_path, capsys):
    out = tmp_path / "out"
    run(f"--model {warm_model} --data-dir {benchmarks} --max-new-tokens 24 --out {out}")
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in BENCHMARKS) and "average" in shown
    report = report_of(out)
    assert list(report["benchmarks"]) == list(BENCHMARKS)
    assert [r["n"] for r in report["benchmarks"].values()] == [2, 3, 4, 5, 6]
    assert report["average"] == sum(r["accuracy"] for r in report["benchmarks"].values()) / 5
    assert report["settings"]["temperature"] == 0 and report["settings"]["template"] == "qwen_math"
    assert (report["settings"]["engine"], report["settings"]["dtype"]) == ("torch", "float32")
    assert {"torch", "transformers", "math_verify"} <= report["versions"].keys()
    responses = read_jsonl(out / "responses.jsonl")
    assert len(responses) == 20 and all(0 < r["tokens"] <= 24 for r in responses)


@pytest.mark.slow
def test_it_scores_what_training_scores(warm_model, tmp_path):
    """The held-out arithmetic problems, greedy: the score is the one that a run starts from, and
    the one that it ends with."""
    out = tmp_path / "run"
    settings = {"model": warm_model, "out": str(out), "steps": 1, "eval_samples": 0}
    train.main(replace(RECIPES["tiny"](), **settings))
    distributed.stop()
    columns = ("accuracy", "n", "dropped", "len_correct", "len_incorrect", "truncated_frac")
    columns += ("unparsed_frac",)
    models = (warm_model, out / "hf")
    for model, expected in zip(models, read_jsonl(out / "eval.jsonl"), strict=True):
        where = tmp_path / f"step-{expected['step']}"
        run(
            f"--model {model} --benchmarks arithmetic_heldout --template arithmetic "
            f"--max-new-tokens 96 --out {where}"
        )
        scores = report_of(where)["benchmarks"]["arithmetic_heldout"]
        assert itemgetter(*columns)(scores) == itemgetter(*columns)(expected)
        low, high = scores["interval"]
        assert low < scores["accuracy"] < high


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--samples 4", "--samples 4 greedy answers would all be the same"),
        ("--seeds 4", "--seeds 4 greedy answers would all be the same"),
        ("--seeds 0", "--seeds 0 must be at least 1"),
        ("--seeds 2 --temperature 1 --compare paper --out o --seed 3", "--compare o/seed-3 paper"),
        ("--template qwen", "qwen_math"),
        ("--templates chat,r1 --system hi", "--system goes with --template chat"),
        ("--answer last", "unknown --answer 'last'"),
        ("--reward maths", "'maths' is neither math nor FILE.py:FUNCTION"),
        ("--reward no.py:f", "there is no file no.py"),
        ("--benchmarks aime24,amc24 --data-dir DIR", "amc24"),
        ("--data-dir nowhere", "nowhere"),
        ("--grader strict", "unknown --grader 'strict'"),
        ("--modle x", "did you mean '--model'"),
        ("--samples 0", "--samples 0 must be at least 1"),
        ("--sampler-batch 0", "--sampler-batch 0 must be at least 1"),
        ("--tp 2", "--tp 2 does not divide the 1 processes"),
        ("--benchmarks ,", "--benchmarks is empty"),
        ("--benchmarks arithmetic --compare paper", "the paper has no scores on arithmetic"),
        ("--model ./no/such/model", "--model ./no/such/model holds no config.json"),
        ("--out /dev/null/eval", "/dev/null is no folder to write to"),
        ("--temperatures 0.5,hot", "numbers with commas"),
        ("--temperatures -1", "temperature -1.0"),
        ("--samples 2 --temperatures 0,1", "greedy answers would all be the same"),
        ("--templates qwen_math,r2", "unknown template 'r2'"),
        ("--engine vlm", "did you mean 'vllm'"),
        ("--dtype bfloat61", "did you mean 'bfloat16'"),
        ("--compare a b", "with --model takes one name"),
        ("--compare nowhere", "no responses at nowhere"),
        ("--compare DIR/aime24.jsonl", "aime24.jsonl:1 lacks benchmark"),
        ("--regrade x", "leave out --model"),
        ("--analyze x --samples 2", "leave out --model, --samples"),
    ],
)
def test_mistakes_are_named(random_model, benchmarks, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(
        eval_py, "make_engine", None
    )  # a mistake is found before anything is loaded
    if not any(flag in flags for flag in ("--data-dir", "--regrade", "--analyze")):
        flags += f" --data-dir {benchmarks}"
    with pytest.raises(SystemExit) as stop:
        run(f"--model {random_model} {flags.replace('DIR', str(benchmarks))}")
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line.startswith("error: ") and message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "name a --model"),
        ("--analyze a --regrade b", "name a --model"),
        ("--compare paper", "must name two"),
        ("--compare paper paper", "must name two"),
        ("--compare x", "must name two"),
        ("--compare x y z", "must name two"),
        ("--compare nowhere paper", "no responses at nowhere"),
        ("--regrade nowhere", "no responses at nowhere"),
        ("--regrade x --grader lax", "unknown --grader 'lax'"),
        ("--regrade x --answer lax", "unknown --answer 'lax'"),
        ("--regrade x --reward math", "leave out --reward"),
        ("--analyze nowhere", "no responses at nowhere"),
    ],
)
def test_mistakes_without_a_model_are_named(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(flags)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--help", 0),
        ("--hepl", 2),
        ("--model m --benchmarks amc24", 2),
        ("--model m --benchmarks nowhere.jsonl", 2),
        ("--regrade nowhere", 2),
    ],
)
def test_mistakes_are_answered_before_torch_is_imported(flags, status):
    code = (
        f"import runpy, sys; sys.argv = ['eval.py', *{flags.split()}]\n"
        "try: runpy.run_path('eval.py', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{status} False", done


@pytest.mark.parametrize("program", ["train", "eval"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model DIR/nowhere", "DIR/nowhere holds no config.json; name a Hugging Face folder"),
        ("--model org/nowhere", "org/nowhere cannot be loaded: .* download the model and name"),
        ("--model DIR/mute", "DIR/mute holds no tokenizer; copy tokenizer.json"),
        ("--model DIR --max-new-tokens 9000", "9000 .* 1024 positions .* at most 1023 are allowed"),
        ("--model DIR --template chat --max-new-tokens 8", "'chat' needs a chat template"),
    ],
)
def test_both_programs_name_a_wrong_model_in_one_line(
    random_model, tmp_path, capsys, program, flags, message
):
    """No network: `HF_HUB_OFFLINE` is set."""
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder, ignore=shutil.ignore_patterns("chat_template*"))
    shutil.copytree(random_model, folder / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    argv = [*flags.replace("DIR", str(folder)).split(), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop, user_errors():
        if program == "train":
            train.main(config.parse_args(["--recipe", "tiny", *argv]))
        eval_py.cli(parse_args(["--benchmarks", "arithmetic_heldout", *argv]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ")
    assert re.search(message.replace("DIR", str(folder)), line)


# ---- the order of things


@pytest.fixture
def command(random_model, tmp_path) -> Command:
    """Two questions for a model that knows nothing: one is short, and one leaves room for four
    tokens only."""
    config = EvalConfig(
        model=random_model,
        out=str(tmp_path / "out"),
        template="none",
        temperature=0.7,
        seed=5,
        max_new_tokens=8,
    )
    problems = [Problem(0, "1+1", "2"), Problem(1, "1" * 1020, "2")]
    return Command(mode="evaluate", config=config, paths=[], sets={"set": problems})


def test_the_settings_reach_the_sampler_and_the_comparison(command, monkeypatch, capsys):
    calls, compared, original = [], [], TorchEngine.generate

    def generate(self, requests, sampling, *args):
        calls.append((sampling, [r.seed for r in requests]))
        return original(self, requests, sampling, *args)

    monkeypatch.setattr(TorchEngine, "generate", generate)
    monkeypatch.setattr(eval_py.compare, "compare", lambda *args: compared.append(args))
    config, sets = replace(command.config, template="r1"), {"set": command.sets["set"][:1]}
    notices, paths = ["set: 1 of 9000 rows is left out"], ["paper"]
    eval_py.main(replace(command, config=config, sets=sets, notices=notices, paths=paths))
    sampling = Sampling(
        max_new_tokens=8, stop_token_ids=(256,), temperature=0.7, stop=("</answer>",)
    )
    assert calls == [(sampling, [sample_seed(5, 0, 0, 0)])]
    assert compared == [(["paper", config.out], config.out)]
    assert "data: set: 1 of 9000 rows is left out" in capsys.readouterr().out


def test_prompt_and_response_end_at_the_positions_of_the_model(command):
    eval_py.main(command)
    rows = read_jsonl(command.config.folder / "responses.jsonl")
    assert [row["tokens"] for row in rows] == [8, 4]


def test_a_prompt_of_all_positions_leaves_no_room_for_a_response(command, tokenizer):
    problems = [Problem(i, "1" * n, "2") for i, n in enumerate((1023, 1024))]
    (part,) = run_module.make_parts(command.config, {"set": problems}, tokenizer, 1024)
    assert [len(p.prompt_ids) for p in part.problems] == [1023, 0]


def test_only_rank_0_writes(command, monkeypatch, capsys):
    distributed.start()
    monkeypatch.setattr(distributed, "start", lambda tp: (1, 1, torch.device("cpu")))
    eval_py.main(command)
    assert capsys.readouterr().out == "" and not list(command.config.folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"model": "org/name"}, "runs/eval/org--name"),
        ({"model": "DIR"}, "DIR/eval"),
        ({"model": "DIR", "out": "here"}, "here"),
    ],
    ids=["hub name", "folder", "--out"],
)
def test_where_an_evaluation_writes(tmp_path, settings, folder):
    settings["model"] = settings["model"].replace("DIR", str(tmp_path))
    assert str(EvalConfig(**settings).folder) == folder.replace("DIR", str(tmp_path))


# ---- interrupted, and resumed

SAMPLED = (
    "--benchmarks aime24,amc --samples 2 --temperature 1 --max-new-tokens 8 --write-every 2 "
    "--template none"
)


@pytest.fixture
def uninterrupted(warm_model, benchmarks, tmp_path) -> tuple[str, bytes]:
    """The flags of an evaluation of 5 problems in two benchmarks, one problem at a time, and what
    responses.jsonl should hold."""
    flags = f"--model {warm_model} --data-dir {benchmarks} {SAMPLED}"
    run(f"{flags} --out {tmp_path / 'whole'}")
    distributed.stop()
    return flags, (tmp_path / "whole" / "responses.jsonl").read_bytes()


def scores_of(folder: Path) -> dict:
    report = report_of(folder)
    names = ("average", "average_interval", "benchmarks", "versions", "counters")
    return {name: report[name] for name in names}


def test_an_interrupted_evaluation_continues(uninterrupted, tmp_path, monkeypatch, capsys):
    flags, expected = uninterrupted
    answer, calls = run_module.answer, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(run_module, "answer", interrupt)
    halves = tmp_path / "halves"
    with pytest.raises(KeyboardInterrupt):
        run(f"{flags} --out {halves}")
    distributed.stop()  # as the end of the process would
    path, lines = halves / "responses.jsonl", expected.splitlines(keepends=True)
    assert path.read_bytes() == b"".join(lines[:6]), "three problems, two samples each"
    with open(path, "ab") as file:
        file.write(lines[6] + b'{"benchmark": "am')  # half a problem, torn
    report = report_of(halves)
    assert report["counters"]["grader_timeouts"] == 0 < report["seconds"]
    report["counters"]["grader_timeouts"] = 2  # of the part before the interruption
    report["seconds"] = 1000.0
    del report["settings"]["seeds"]  # as before there was --seeds
    (halves / "eval.json").write_text(json.dumps(report))
    capsys.readouterr()
    run(f"{flags} --out {halves}")
    assert len(calls) == 4 + 2, "only what is left is sampled"
    assert path.read_bytes() == expected
    resumed, whole = scores_of(halves), scores_of(tmp_path / "whole")
    assert resumed.pop("counters") == whole.pop("counters") | {"grader_timeouts": 2}
    assert resumed == whole and report_of(halves)["seconds"] > 1000
    assert "grader timeouts: 2" in capsys.readouterr().out


def test_a_finished_evaluation_is_not_sampled_again(uninterrupted, tmp_path, monkeypatch, capsys):
    flags, expected = uninterrupted
    whole = tmp_path / "whole"
    before = scores_of(whole)
    monkeypatch.setattr(eval_py, "make_engine", None)
    run(f"{flags} --out {whole} --compare paper")
    assert (whole / "responses.jsonl").read_bytes() == expected
    assert scores_of(whole) == before
    shown = capsys.readouterr().out
    assert "5 problems are answered, 0 are left" in shown and "Oat-Zero-7B" in shown
    assert (whole / "compare.json").exists()


@pytest.mark.parametrize("change", ["--seed 1", "--benchmarks amc", "--grader paper"])
def test_other_settings_are_not_mixed_in(uninterrupted, tmp_path, capsys, change):
    flags, expected = uninterrupted
    with pytest.raises(SystemExit):
        run(f"{flags} {change} --out {tmp_path / 'whole'}")
    assert f"{change.split()[0][2:]} is" in capsys.readouterr().err
    assert (tmp_path / "whole" / "responses.jsonl").read_bytes() == expected


def test_changed_problems_are_not_mixed_in(uninterrupted, benchmarks, tmp_path, capsys):
    flags, _ = uninterrupted
    (benchmarks / "amc.jsonl").write_text('{"problem": "other", "answer": "1"}\n')
    with pytest.raises(SystemExit):
        run(f"{flags} --out {tmp_path / 'whole'}")
    assert "data is" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_answer_what_one_does(uninterrupted, tmp_path):
    """Five problems, one a chunk: the second process has none in the chunks of one."""
    flags, expected = uninterrupted
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "eval.py", *flags.split(), "--out", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "two" / "responses.jsonl").read_bytes() == expected
    assert scores_of(tmp_path / "two") == scores_of(tmp_path / "whole")


# ---- several seeds


def test_several_seeds_are_several_evaluations(uninterrupted, tmp_path, capsys, monkeypatch):
    """Each seed's folder is the one that --seed makes. The engine starts once."""
    flags, expected = uninterrupted
    started, make_engine = [], eval_py.make_engine

    def make(*args):
        started.append(args)
        return make_engine(*args)

    monkeypatch.setattr(eval_py, "make_engine", make)
    out = tmp_path / "seeds"
    run(f"{flags} --seeds 2 --out {out}")
    assert len(started) == 1
    assert (out / "seed-0" / "responses.jsonl").read_bytes() == expected
    distributed.stop()
    run(f"{flags} --seed 1 --out {tmp_path / 'one'}")
    one = (tmp_path / "one" / "responses.jsonl").read_bytes()
    assert (out / "seed-1" / "responses.jsonl").read_bytes() == one != expected
    shown = capsys.readouterr().out
    assert "over 2 seeds" in shown and "seeds.json" in shown
    found = json.loads((out / "seeds.json").read_text())
    assert found["seeds"] == [0, 1] and len(found["evaluations"]) == 1
    distributed.stop()
    run(f"{flags} --seeds 3 --out {out}")
    assert len(started) == 3, "one for --seed 1, one for the third seed"
    assert capsys.readouterr().out.count("5 problems are answered, 0 are left") == 2


# ---- several templates and temperatures


def test_one_model_under_several_templates_and_temperatures(
    warm_model, benchmarks, tmp_path, capsys
):
    out = tmp_path / "out"
    run(
        f"--model {warm_model} --data-dir {benchmarks} --benchmarks aime24,amc --samples 2 "
        "--templates qwen_math,r1,none --temperatures 0.5,1 --max-new-tokens 4 "
        f"--out {out}"
    )
    evaluations = report_of(out)["evaluations"]
    assert all(e["benchmarks"]["aime24"]["n"] == 2 for e in evaluations), "problems, not samples"
    keys = [(e["template"], e["temperature"]) for e in evaluations]
    assert keys == [(name, t) for name in ("qwen_math", "r1", "none") for t in (0.5, 1.0)]
    rows = read_jsonl(out / "responses.jsonl")
    which = itemgetter("template", "temperature", "benchmark", "id", "sample")
    assert len(rows) == len(set(map(which, rows))) == 6 * 5 * 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "pass@2 %" in shown and "mean@2 %" in shown and "accuracy %" in shown
    assert "same problems: these, answered again" in shown
    run(f"--analyze {out / 'responses.jsonl'}")
    assert len(json.loads((out / "analysis.json").read_text())["evaluations"]) == 6
    assert (out / "analysis.png").exists()


def test_prompts_too_long_for_the_model_are_wrong_and_reported(warm_model, tmp_path, capsys):
    rows = [{"problem": "1+1+x=3" + " " * extra, "answer": "1"} for extra in (0, 2000, 0)]
    append_jsonl(tmp_path / "set.jsonl", rows)
    run(
        f"--model {warm_model} --benchmarks {tmp_path / 'set.jsonl'} --template none "
        f"--max-new-tokens 4 --out {tmp_path / 'out'}"
    )
    (scores,) = report_of(tmp_path / "out")["benchmarks"].values()
    assert (scores["n"], scores["dropped"]) == (3, 1)
    assert "1 of 3 prompts are too long for the model and count as wrong" in capsys.readouterr().out
    responses = read_jsonl(tmp_path / "out" / "responses.jsonl")
    assert [r["response"] is None for r in responses] == [False, True, False]


# ---- a reward, and answers that no rule finds


def test_a_reward_is_reported_beside_the_accuracy(warm_model, tmp_path, capsys):
    """One component counts digits. The other one fails on every wrong answer."""
    header = "(response, *, problem, answer, finished, **columns)"
    mine = tmp_path / "mine.py"
    mine.write_text(
        f"def digits{header}: return sum(map(str.isdigit, response))\n"
        f"def right{header}: return 1 / response.endswith('#' + answer)\n"
    )
    run(
        f"--model {warm_model} --benchmarks arithmetic_heldout --template arithmetic "
        f"--max-new-tokens 96 --out {tmp_path / 'out'} --reward 0.5*{mine}:digits+{mine}:right"
    )
    (scores,) = report_of(tmp_path / "out")["benchmarks"].values()
    rows = read_jsonl(tmp_path / "out" / "responses.jsonl")
    for row in rows:
        digits = sum(map(str.isdigit, row["response"]))
        assert row["components"] == {"digits": digits, "right": 1.0 if row["score"] else None}
        assert row["reward"] == 0.5 * digits + row["score"]
    assert scores["reward/right"] == scores["accuracy"], "a failure counts as 0"
    assert scores["reward_errors"] == sum(row["score"] == 0 for row in rows) > 0
    assert scores["reward"] == pytest.approx(0.5 * scores["reward/digits"] + scores["accuracy"])
    shown = capsys.readouterr().out
    parts = f"digits {scores['reward/digits']:.3f}, right {scores['reward/right']:.3f}"
    assert f"reward of {parts}; {scores['reward_errors']} calls failed" in " ".join(shown.split())
    assert f"{scores['reward']:.3f}" in shown
    assert "no answer in" not in shown
    run(f"--regrade {tmp_path / 'out'}")
    regraded = read_jsonl(tmp_path / "out" / "regraded-correct" / "responses.jsonl")
    assert not any("reward" in row for row in regraded), "it was made of the old grades"


NUMBERS = ["It is 12.", "So 12", "#### 12", "13"]


@pytest.mark.parametrize(
    ("texts", "advice"),
    [
        (NUMBERS, "no answer in 4 of 4 responses, 'qwen_math' at T=1. --answer number finds one"),
        (["12\n#### 12"] * 9 + ["\\boxed{12}"], "9 of 10 responses, .* --answer gsm8k finds"),
        (["</think> <answer>12</answer>"] * 4, "--answer tag finds one in 4 of them"),
        (["1#12"] * 4, "--answer hash finds one in 4 of them"),
        (["It is twelve"] * 4, "No --answer finds one.* try --template chat"),
    ],
    ids=["number", "gsm8k", "tag", "hash", "none"],
)
def test_the_rule_that_would_have_found_an_answer_is_named(tmp_path, capsys, texts, advice):
    old = {"answer": "12", "score": 0.0, "parsed": False}
    rows = [response_row(**old, id=i, response=text) for i, text in enumerate([*texts, None])]
    append_jsonl(tmp_path / "responses.jsonl", rows)
    run(f"--regrade {tmp_path}")
    assert re.search(advice, capsys.readouterr().out)


def test_an_answer_here_and_there_needs_no_advice(tmp_path, capsys):
    texts = ["12"] * 8 + ["\\boxed{12}"] * 2
    rows = [response_row(id=i, answer="12", response=text) for i, text in enumerate(texts)]
    append_jsonl(tmp_path / "responses.jsonl", rows)
    run(f"--regrade {tmp_path}")
    assert "no answer in" not in capsys.readouterr().out


def test_regrading_with_another_rule_finds_the_answers(tmp_path, capsys):
    """Also under a template whose file is gone. The rule is kept for the next time."""
    old = {"answer": "12", "score": 0.0, "parsed": False, "template": "gone.txt"}
    rows = [response_row(**old, id=i, response=text) for i, text in enumerate(NUMBERS)]
    append_jsonl(tmp_path / "responses.jsonl", rows)
    run(f"--regrade {tmp_path} --answer number")
    first = tmp_path / "regraded-correct-number"
    assert [r["score"] for r in read_jsonl(first / "responses.jsonl")] == [1, 1, 1, 0]
    assert report_of(first)["settings"]["answer"] == "number"
    run(f"--regrade {first} --out {tmp_path / 'again'}")
    assert report_of(tmp_path / "again")["benchmarks"]["b"]["accuracy"] == 0.75
    assert "no answer in" not in capsys.readouterr().out


def test_a_prompt_of_several_lines_with_brackets_is_shown_as_it_is(tmp_path, capsys):
    """On one line, and not as markup of the terminal."""
    rows = [response_row(template=text, answer="12") for text in ("[INST] {q}\n[/INST]", "none")]
    append_jsonl(tmp_path / "responses.jsonl", rows)
    run(f"--regrade {tmp_path}")
    assert "'[INST] {q}\\n[/INST]', mean of 1 at T=1" in capsys.readouterr().out


def test_a_prompt_and_a_rule_of_ones_own(warm_model, tmp_path, capsys):
    """The tiny model answers as it does under its own template. Another text under the same name
    is not mixed in."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{q}~\n")
    flags = f"--model {warm_model} --benchmarks arithmetic_heldout --max-new-tokens 96"
    run(f"{flags} --template {prompt} --answer hash --out {tmp_path / 'mine'}")
    run(f"{flags} --template arithmetic --out {tmp_path / 'own'}")
    mine, own = report_of(tmp_path / "mine"), report_of(tmp_path / "own")
    assert mine["benchmarks"] == own["benchmarks"] and mine["average"] > 0
    assert mine["template"] == str(prompt)
    prompt.write_text("{q}!~")
    with pytest.raises(SystemExit):
        run(f"{flags} --template {prompt} --answer hash --out {tmp_path / 'mine'}")
    assert "prompts is" in capsys.readouterr().err


# ---- without a model


def test_regrading_gives_the_grades_that_were_given(warm_model, tmp_path, capsys):
    whole = tmp_path / "run"
    run(
        f"--model {warm_model} --benchmarks arithmetic_heldout --template arithmetic --samples 2 "
        f"--temperature 1 --max-new-tokens 96 --out {whole}"
    )
    capsys.readouterr()
    run(f"--regrade {whole / 'responses.jsonl'}")
    assert "of 256 grades 0 rose and 0 fell" in capsys.readouterr().out
    again = whole / "regraded-correct"
    assert (again / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()
    assert scores_of(again) == scores_of(whole) and 0 < scores_of(whole)["average"] < 1
    with pytest.raises(SystemExit):
        run(f"--regrade {whole / 'responses.jsonl'}")
    assert "regraded-correct holds responses.jsonl already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "scores"), [("correct", [1, 0, 0, 0]), ("paper", [0, 1, 0, 0])], ids=str
)
def test_regrading_changes_grades_only(tmp_path, mode, scores):
    """The paper's grader trips over Minerva's trailing newline."""
    old = {"benchmark": "minerva", "answer": ["7 \\times 10^{37}\n"], "score": 0.0, "parsed": False}
    texts = [r"\boxed{7.0 \times 10^{37}}", r"\boxed{10}", "none", None]
    rows = [response_row(**old, id=id, response=text) for id, text in enumerate(texts)]
    append_jsonl(tmp_path / "responses.jsonl", rows)
    run(f"--regrade {tmp_path} --grader {mode} --out {tmp_path / mode}")
    graded = read_jsonl(tmp_path / mode / "responses.jsonl")
    assert [r["score"] for r in graded] == scores
    assert [r["parsed"] for r in graded] == [True, True, False, False]
    untouched = [row | {"score": 0.0, "parsed": False} for row in graded]
    assert untouched == rows
    assert report_of(tmp_path / mode)["settings"]["grader"] == mode


def test_two_runs_are_compared_from_the_command_line(uninterrupted, tmp_path, capsys):
    capsys.readouterr()
    run(f"--compare {tmp_path / 'whole'} {tmp_path / 'whole'} --out {tmp_path / 'both'}")
    report = json.loads((tmp_path / "both" / "compare.json").read_text())
    assert report["evaluations"][0]["average"]["p"] == 1 and "B - A" in capsys.readouterr().out


def test_the_real_aime24(warm_model, tmp_path):
    if not SHARED_DATA.exists():
        pytest.skip(f"the benchmarks are not at {SHARED_DATA}")
    run(
        f"--model {warm_model} --benchmarks aime24 --data-dir {SHARED_DATA / 'eval'} "
        f"--max-new-tokens 16 --out {tmp_path}"
    )
    assert report_of(tmp_path)["benchmarks"]["aime24"]["n"] == 30
