"""What this proves: problems load from every kind of source, every mistake in a source is answered
with its way out, the problems of a step are a function of (seed, step) alone, and contamination is
found."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from drgrpo import data
from drgrpo.config import RECIPES, Config
from drgrpo.data import (
    BENCHMARKS,
    EVAL_SETS,
    HUB,
    Columns,
    Share,
    benchmark_source,
    check_sources,
    load_problems,
    load_sets,
    overlap,
    share_before,
    step_problems,
)
from drgrpo.types import Problem, UserError

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"
ROWS = [
    {"problem": "What is $1+1$?", "answer": "2"},
    {"problem": "And ½ + ½?\n", "answer": 1.0},
    {"problem": "Any root of $x^2=4$?", "answer": ["2\n", "-2"]},
]
PROBLEMS = [Problem(i, row["problem"], row["answer"]) for i, row in enumerate(ROWS)]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path: Path, rows: list) -> str:
    return write(path, "\n".join(map(json.dumps, rows)) + "\n")


def answers(source: str) -> list:
    return [problem.answer for problem in load_problems(source)]


# Sources.


def test_json_files(tmp_path):
    blank_lines = "\n\n".join(map(json.dumps, ROWS))
    assert load_problems(write(tmp_path / "set.jsonl", blank_lines)) == PROBLEMS
    assert load_problems(write(tmp_path / "set.json", json.dumps(ROWS))) == PROBLEMS


def test_a_colon_in_the_name_of_a_file_names_no_split(tmp_path):
    assert load_problems(jsonl(tmp_path / "set:1.jsonl", ROWS)) == PROBLEMS


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([ROWS[0], {"problem": "2+2?", "answer": "4"}])
    parquet.write_table(table, tmp_path / "set.parquet")
    assert answers(str(tmp_path / "set.parquet")) == ["2", "4"]


def test_saved_folder_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    one, two, empty = (str(tmp_path / name) for name in ("one", "two", "empty"))
    rows = datasets.Dataset.from_dict({"problem": ["1+1?", "2+2?"], "answer": ["2", "4"]})
    rows.save_to_disk(one)
    datasets.DatasetDict({"test": rows.select([1]), "train": rows}).save_to_disk(two)
    Path(empty).mkdir()
    assert answers(one) == answers(two) == answers(f"{two}:train") == ["2", "4"]
    assert answers(f"{two}:test") == ["4"]
    for source, message in {
        f"{two}:tests": r"split of .*two: 'tests'; did you mean 'test'\? there are test, train",
        f"{one}:test": "leave out ':test'",
        empty: "save_to_disk wrote; it holds nothing",
    }.items():
        with pytest.raises(UserError, match=message):
            load_problems(source)


MATH = [{"problem": f"p{i}", "answer": str(i), "level": f"Level {i}"} for i in range(1, 6)]
ASDIV = [
    {"body": "Ann has 9.", "question": "How many?", "answer": "9 (apples)", "formula": "5+4=9"},
    {"body": "Two of them.", "question": "Which?", "answer": "3; 5", "formula": "3; 5"},
    {"body": "Bo has 7.", "question": "Halves?", "answer": "3 (halves)", "formula": "7/2=3 r1"},
]
GSM8K = [{"question": "q", "answer": "a #### mark\n#### 30,000"}]
REPOS = {
    "rasbt/math_full_minus_math500": {"train": MATH},
    "openai/gsm8k": {"train": GSM8K, "test": [{"question": "t", "answer": "#### 7"}]},
    "EleutherAI/asdiv": {"validation": ASDIV},
    "HuggingFaceH4/aime_2024": {"train": [{"problem": "p", "answer": "025"}]},
    "AI-MO/aimo-validation-amc": {"train": [{"problem": "p", "answer": 142.0}]},
    "HuggingFaceH4/MATH-500": {"test": [{"problem": "p", "answer": "p - q"}]},
    "math-ai/minervamath": {"test": [{"question": "p", "answer": "9.6"}]},
    "math-ai/olympiadbench": {"test": [{"question": "p", "final_answer": ["$2$"]}]},
    "someone/set": {"a": [{"problem": "in a", "answer": "1"}], "b": MATH[1:2]},
    "someone/test-only": {"test": MATH[:1]},
}


class Split(list):
    def to_list(self):
        return list(self)


class Hub:
    """Stands for the `datasets` library. Its rows are made up, in the columns of the real sets."""

    def __init__(self):
        self.requests = []

    def load_dataset(self, repo, config):
        self.requests.append((repo, config))
        if repo not in REPOS:
            raise FileNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub")
        return {name: Split(rows) for name, rows in REPOS[repo].items()}


@pytest.fixture
def hub(monkeypatch):
    library = Hub()
    monkeypatch.setattr(data, "_datasets", lambda source: library)
    return library


ANN = Problem(0, "Ann has 9. How many?", "9", columns={"formula": "5+4=9"})


def math(level: int) -> Problem:
    return Problem(level - 1, f"p{level}", str(level), columns={"level": f"Level {level}"})


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("math_12k", [math(level) for level in range(1, 6)]),
        ("math_lvl3to5", [math(level) for level in range(3, 6)]),
        ("gsm8k", [Problem(0, "q", "30,000")]),
        ("gsm8k_test", [Problem(0, "t", "7")]),
        ("asdiv", [ANN, Problem(2, "Bo has 7. Halves?", "3", columns={"formula": "7/2=3 r1"})]),
        ("asdiv_formulas", [ANN]),
        ("aime24", [Problem(0, "p", "025")]),
        ("amc", [Problem(0, "p", 142.0)]),
        ("math500", [Problem(0, "p", "p - q")]),
        ("minerva", [Problem(0, "p", "9.6")]),
        ("olympiad_bench", [Problem(0, "p", ["$2$"])]),
    ],
)
def test_named_sets(hub, name, problems):
    assert load_problems(name) == problems
    assert hub.requests == [(HUB[name].repo, "main" if name.startswith("gsm8k") else None)]


def test_every_name_is_tested():
    others = {"math_12k", "math_lvl3to5", "gsm8k", "gsm8k_test", "asdiv", "asdiv_formulas"}
    assert set(HUB) == {*BENCHMARKS, "aime25", *others}
    assert set(EVAL_SETS.values()) <= set(HUB)


def test_hub_name_with_split(hub):
    assert answers("someone/set:b") == ["2"] and answers("someone/test-only") == ["1"]
    with pytest.raises(UserError, match=r"split of someone/set: 'train'.*there are a, b"):
        load_problems("someone/set")
    with pytest.raises(UserError, match=r"cannot load 'someone/sett'.*name the file"):
        load_problems("someone/sett")


def test_shares_of_a_set_are_disjoint_and_complete(tmp_path):
    rows = [{"problem": f"{i} + 1 = ?", "answer": i + 1} for i in range(400)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    parts = [load_problems(f"{path}{share}") for share in ("[:25%]", "[25%:75%]", "[75%:]")]
    assert sorted(p.id for p in chain(*parts)) == list(range(400))
    assert [round(len(part), -1) for part in parts] == [100, 200, 100]
    assert load_problems(f"{path}[:]") == load_problems(path)
    # neither the other rows nor white space and case move a question
    others = [{"problem": f" {row['problem']}  ", "answer": 0} for row in rows[9:]]
    moved = jsonl(tmp_path / "b.jsonl", others)
    ids = [p.id + 9 for p in load_problems(f"{moved}[:25%]")]
    assert ids == [p.id for p in parts[0] if p.id >= 9]


def test_shares_of_named_sets_and_splits(hub):
    assert len(load_problems("math_12k[:50%]")) + len(load_problems("math_12k[50%:]")) == 5
    assert len(load_problems("arithmetic[:10%]")) < len(load_problems("arithmetic"))
    assert load_problems("someone/set:b[:]") == load_problems("someone/set:b")


@pytest.mark.parametrize(
    "share", ["[80%:20%]", "[50%:50%]", "[:120%]", "[:80]", "[:.5%]", "[-5%:]"]
)
def test_a_share_that_is_empty_or_not_in_percent(tmp_path, share):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="must end in a share such as"):
        check_sources(config_of(f"{path}{share}"))


def test_the_share_before_another():
    assert share_before("set.jsonl[25%:75%]") == "set.jsonl[:25%]"
    assert share_before("someone/set:b[50%:]") == "someone/set:b[:50%]"
    for source in ("set.jsonl", "set.jsonl[:50%]"):
        with pytest.raises(UserError, match="there are none; leave it a share"):
            share_before(source)


def test_a_share_without_problems(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"problem": "1?", "answer": 1}])
    (problem,) = load_problems(path)
    empty = "[50%:]" if Share.of("a[:50%]").holds(problem) else "[:50%]"
    with pytest.raises(UserError, match="none of its 1 problems is in the share"):
        load_problems(f"{path}{empty}")


def test_arithmetic():
    assert [len(load_problems(name)) for name in ("arithmetic", "arithmetic_heldout")] == [421, 128]


def test_a_bare_machine_trains_on_arithmetic_and_jsonl(tmp_path):
    source = jsonl(tmp_path / "set.jsonl", ROWS)
    code = (
        "import sys\n"
        "absent = ['torch', 'datasets', 'pyarrow', 'math_verify', 'pebble']\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from drgrpo.config import Config\n"
        "from drgrpo.data import check_sources, load_problems, load_sets\n"
        f"config = Config(recipe='', train_data={source!r}, eval_data='arithmetic')\n"
        "check_sources(config)\n"
        "train, evaluation = load_sets(config, print)\n"
        "print(len(train), len(evaluation['arithmetic']))\n"
        "try: load_problems('math_12k')\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("3 421\n") and "pip install datasets" in run.stdout, run


# The sets of a run.


def config_of(train: str, evaluation: str = "", **fields: str) -> Config:
    return replace(RECIPES["tiny"](), train_data=train, eval_data=evaluation, **fields)


def test_the_sets_of_a_run(tmp_path):
    rows = [{"q": f"{i}+0?", "gold": i} for i in range(1000)] + [{"q": "", "gold": 0}]
    train, log = jsonl(tmp_path / "train.jsonl", rows), []
    evaluation = jsonl(tmp_path / "eval.jsonl", ROWS)
    config = config_of(train, f"{evaluation}, arithmetic", problem_field="q", answer_field="gold")
    problems, eval_sets = load_sets(config, log.append)
    assert problems == [Problem(i, f"{i}+0?", i) for i in range(1000)]
    assert list(eval_sets) == [evaluation, "arithmetic"] and eval_sets[evaluation] == PROBLEMS
    assert len(log) == 1 and log[0].startswith(f"data: {train}: 1 of 1001 rows")
    check_sources(config)
    with pytest.raises(UserError, match="no field 'problem'"):
        check_sources(replace(config, eval_data=train))


@pytest.mark.parametrize("name", ["missing.jsonl", "broken.json", "field.jsonl", "math_lvl3-5"])
@pytest.mark.parametrize("field", ["train_data", "eval_data"])
def test_a_mistake_is_answered_before_anything_is_loaded(tmp_path, monkeypatch, name, field):
    write(tmp_path / "broken.json", "[{")
    jsonl(tmp_path / "field.jsonl", [{"problem": "1+1?"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=name):
        check_sources(replace(RECIPES["tiny"](), **{field: name}))


def test_what_needs_the_datasets_library_is_left_to_the_loading(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_datasets", lambda source: pytest.fail("datasets was imported"))
    parquet = write(tmp_path / "broken.parquet", "no parquet")
    check_sources(config_of("math_12k", f"someone/set:b, {tmp_path}, {parquet}, arithmetic"))


# Mistakes.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("math_trian.jsonl", r"no 'math_trian.jsonl' in .*; did you mean 'math_train.jsonl'\?"),
        ("nowhere/set.jsonl", "there is no folder nowhere"),
        ("./someone/set", "there is no folder someone"),
        ("some/where/set", "there is no folder some/where"),
        ("math_lvl3-5", r"did you mean 'math_lvl3to5'\?.*sets known by name are math_12k, "),
        ("set.csv", r"unknown file type '.csv'; use .jsonl"),
    ],
)
def test_no_such_source(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "math_train.jsonl", ROWS)
    write(tmp_path / "set.csv", "problem,answer")
    with pytest.raises(UserError, match=message):
        load_problems(source)


def test_unknown_field_names_the_nearest(tmp_path):
    source = jsonl(tmp_path / "set.jsonl", [{"problem": "1+1?", "answers": "2", "level": 1}])
    message = r"no field 'answer'; did you mean 'answers'\? .* problem, answers, level .*--answer-"
    with pytest.raises(UserError, match=message):
        load_problems(source)
    with pytest.raises(UserError, match=r"no field 'question'"):
        load_problems(source, Columns(("question",)))


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "", "answer": "2"},
        {"problem": " \n", "answer": "2"},
        {"problem": None, "answer": "2"},
        {"answer": "2"},
        {"problem": "1+1?", "answer": ""},
        {"problem": "1+1?", "answer": " \n"},
        {"problem": "1+1?", "answer": None},
        {"problem": "1+1?"},
        {"problem": "1+1?", "answer": []},
        {"problem": "1+1?", "answer": ["2", ""]},
        {"problem": "1+1?", "answer": float("nan")},
        {"problem": "1+1?", "answer": True},
        {"problem": "1+1?", "answer": {"value": 2}},
    ],
    ids=repr,
)
def test_incomplete_rows_are_counted_and_named(tmp_path, row):
    source = jsonl(tmp_path / "set.jsonl", [ROWS[0], row, ROWS[1], *[row] * 6])
    message = r"7 of 9 rows have .* row 2, 4, 5, 6, 7 \.\.\. \(counted from 1\)"
    with pytest.raises(UserError, match=message):
        load_problems(source)


def test_the_odd_incomplete_row_of_a_large_set_is_left_out_and_logged(tmp_path):
    log = []
    rows = [{"problem": f"{i}+0?", "answer": str(i)} for i in range(2000)]
    rows[7] = {"problem": "7+0?", "answer": ""}
    rows[1500] = {"problem": "1500+0?", "answer": None}
    problems = load_problems(jsonl(tmp_path / "set.jsonl", rows), log=log.append)
    assert len(problems) == 1998 and [p.id for p in problems[6:8]] == [6, 8]
    (message,) = log
    assert "2 of 2000 rows" in message
    assert message.endswith("row 8, 1501 (counted from 1); left out")
    rows[1501] = {"problem": "1501+0?"}
    with pytest.raises(UserError, match="3 of 2000 rows"):
        load_problems(jsonl(tmp_path / "set.jsonl", rows), log=log.append)


ROW = json.dumps(ROWS[0]).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.jsonl", b"", "is empty"),
        ("set.jsonl", b"\n\n", "is empty"),
        ("set.json", b"", "is empty"),
        ("set.json", b"[]", "is empty"),
        ("set.jsonl", ROW + b'\n{"problem": "1+1?", "answ\n', r"set.jsonl:2: broken JSON"),
        ("set.json", b"[\n" + ROW + b",\n]", r"set.json:3: broken JSON"),
        ("set.jsonl", b'{"problem": "\xff"}\n', r"set.jsonl:1: broken JSON.*utf-8"),
        ("set.jsonl", ROW + b"\n[1]\n", r"set.jsonl:2: expected an object, found list"),
        ("set.json", ROW, "list of objects"),
    ],
)
def test_a_file_that_holds_no_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_problems(str(tmp_path / name))


# Steps.

TEN = [Problem(i, f"p{i}", str(i)) for i in range(10)]


def stream(steps: range, prompts_per_step: int, seed: int) -> list[int]:
    return [p.id for step in steps for p in step_problems(TEN, step, prompts_per_step, seed)]


def test_an_epoch_holds_every_problem_once_in_an_order_of_its_own():
    ids = stream(range(1, 9), 5, seed=0)
    epochs = [ids[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_may_span_epochs():
    ids = stream(range(1, 31), 7, seed=3)
    assert ids == stream(range(1, 8), 30, seed=3)
    assert sorted(ids[:10]) == sorted(ids[10:20]) == list(range(10))
    assert len(step_problems(TEN, 1, 25, seed=3)) == 25


def test_steps_are_a_function_of_the_seed():
    epochs = [stream(range(e, e + 1), 10, seed) for seed in (1, 2) for e in (1, 2)]
    again = [stream(range(e, e + 1), 10, seed) for seed in (1, 2) for e in (1, 2)]
    assert epochs == again
    assert len({tuple(epoch) for epoch in epochs}) == 4, "no seed has an epoch of another"


# Contamination and benchmarks.


def test_overlap_sees_through_case_space_and_latex_spacing():
    same, other = "Find $x,\\, y$  if\n\\quad $x = y$.", "Something else"
    train = [Problem(3, same, "1"), Problem(4, other, "1")]
    evaluation = [Problem(7, "find $x,y$ if $x=y$.", "1"), Problem(8, "Find $x,z$ if $x=y$.", "1")]
    assert overlap(train, evaluation) == [(3, 7)]
    assert overlap(train[1:], evaluation) == []


def test_benchmark_source(tmp_path):
    source = jsonl(tmp_path / "amc.jsonl", ROWS)
    assert benchmark_source("amc", str(tmp_path)) == source
    assert benchmark_source("amc", None) == "amc"
    with pytest.raises(UserError, match=r"no aime24.jsonl in .*it holds amc.jsonl"):
        benchmark_source("aime24", str(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        benchmark_source("aime24", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"'aime_24'; did you mean 'aime24'\?"):
        benchmark_source("aime_24", None)


def test_the_benchmark_gsm8k_is_the_test_split():
    """The training data of the same name is the other split."""
    source = benchmark_source("gsm8k", None)
    assert HUB[source].split == "test" and HUB["gsm8k"].split == "train"
    assert benchmark_source("aime25", None) == "aime25"


@pytest.mark.parametrize(
    ("name", "rows"), list(zip(EVAL_SETS, (30, 83, 500, 272, 675, 30, 1319), strict=True))
)
def test_the_benchmarks(name, rows):
    if not (SHARED / "eval").exists():
        pytest.skip(f"no {SHARED}")
    problems = load_problems(benchmark_source(name, str(SHARED / "eval")))
    assert [p.id for p in problems] == list(range(rows))


def test_rows_without_an_answer_in_a_real_file():
    path, log = SHARED / "train/math_12k.jsonl", []
    if not path.exists():
        pytest.skip(f"no {path}")
    assert len(load_problems(str(path), log=log.append)) == 11995
    assert "5 of 12000 rows" in log[0] and "row 5342, 5344, 6628, 7302, 10671" in log[0]


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_json_that_nests_too_deeply_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("[" * 5000)
    with pytest.raises(UserError, match=rf"{name}:1: broken JSON: it nests too deeply"):
        load_problems(str(tmp_path / name))


def test_a_broken_parquet_file_is_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" * 5)
    with pytest.raises(UserError, match=r"rows.parquet is broken or no Parquet file: "):
        load_problems(str(tmp_path / "rows.parquet"))


def test_a_broken_folder_is_one_line(tmp_path):
    (tmp_path / "state.json").write_text("")
    (tmp_path / "dataset_info.json").write_text("")
    with pytest.raises(UserError, match="is a broken folder of datasets: JSONDecodeError: "):
        load_problems(str(tmp_path))


@pytest.mark.parametrize(
    ("problem", "answer"), [("\ud800", "1"), ("q", 10**400), ("q", float("nan"))]
)
def test_a_cell_that_is_no_text_or_no_number_is_counted_as_missing(tmp_path, problem, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": problem, "answer": answer}) + "\n")
    with pytest.raises(UserError, match="1 of 1 rows have no question"):
        load_problems(str(path))
