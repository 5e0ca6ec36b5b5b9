"""What this proves: problems load from every kind of source, a mistake in any of them is said with
its way out before any work starts, the problems of a step are a function of (seed, step) alone, and
contamination is found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drgrpo import data
from drgrpo.data import BENCHMARKS, HUB, benchmark_source, load_problems, overlap, step_problems
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


# Sources.


def test_jsonl_with_blank_lines(tmp_path):
    source = write(tmp_path / "set.jsonl", "\n\n".join(map(json.dumps, ROWS)))
    assert load_problems(source) == PROBLEMS
    assert load_problems(source, limit=2) == PROBLEMS[:2]


def test_json(tmp_path):
    assert load_problems(write(tmp_path / "set.json", json.dumps(ROWS))) == PROBLEMS


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [ROWS[0], {"problem": "2+2?", "answer": "4"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    assert [p.answer for p in load_problems(str(tmp_path / "set.parquet"))] == ["2", "4"]


def test_other_field_names(tmp_path):
    source = jsonl(tmp_path / "set.jsonl", [{"q": "1+1?", "gold": 2}])
    assert load_problems(source, problem_field="q", answer_field="gold") == [Problem(0, "1+1?", 2)]


def test_saved_folder_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"problem": ["1+1?", "2+2?"], "answer": ["2", "4"]}
    one = datasets.Dataset.from_dict(rows)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert [p.answer for p in load_problems(str(tmp_path / "one"))] == ["2", "4"]
    assert [p.answer for p in load_problems(str(tmp_path / "two"))] == [
        "2",
        "4",
    ]  # "train" if nothing is said
    assert [p.answer for p in load_problems(f"{tmp_path / 'two'}:test")] == ["4"]
    with pytest.raises(
        UserError, match=r"no split 'tests' \(did you mean 'test'\?\); it has train, test"
    ):
        load_problems(f"{tmp_path / 'two'}:tests")
    with pytest.raises(UserError, match="leave out ':test'"):
        load_problems(f"{tmp_path / 'one'}:test")
    (tmp_path / "three").mkdir()
    with pytest.raises(UserError, match="save_to_disk"):
        load_problems(str(tmp_path / "three"))


class Split(list):
    def to_list(self):
        return list(self)


@pytest.fixture
def hub(monkeypatch):
    """A hub of made-up rows in the columns of the real sets."""
    math = [{"problem": f"p{i}", "answer": str(i), "level": f"Level {i}"} for i in range(1, 6)]
    repos = {
        "rasbt/math_full_minus_math500": {"train": math},
        "openai/gsm8k": {
            "train": [{"question": "q", "answer": "so 30,000\n#### 30,000"}],
            "test": [],
        },
        "EleutherAI/asdiv": {
            "validation": [
                {"body": "Ann has 9.", "question": "How many?", "answer": "9 (apples)"},
                {"body": "Two of them.", "question": "Which?", "answer": "3; 5"},
            ]
        },
        "HuggingFaceH4/aime_2024": {"train": [{"problem": "p", "answer": "025"}]},
        "AI-MO/aimo-validation-amc": {"train": [{"problem": "p", "answer": 142.0}]},
        "HuggingFaceH4/MATH-500": {"test": [{"problem": "p", "answer": "p - q"}]},
        "math-ai/minervamath": {"test": [{"question": "p", "answer": "9.6"}]},
        "math-ai/olympiadbench": {"test": [{"question": "p", "final_answer": ["$2$"]}]},
        "someone/set": {
            "a": [{"problem": "in a", "answer": "1"}],
            "b": [{"problem": "in b", "answer": "2"}],
        },
    }
    repos["someone/test-only"] = {"test": [{"problem": "p", "answer": "1"}]}
    asked = []

    class Library:
        @staticmethod
        def load_dataset(repo, config):
            asked.append((repo, config))
            if repo not in repos:
                raise FileNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub")
            return {name: Split(rows) for name, rows in repos[repo].items()}

    monkeypatch.setattr(data, "_datasets", lambda source: Library)
    return asked


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("math_12k", [Problem(i - 1, f"p{i}", str(i)) for i in range(1, 6)]),
        ("math_lvl3to5", [Problem(i - 1, f"p{i}", str(i)) for i in range(3, 6)]),
        ("gsm8k", [Problem(0, "q", "30,000")]),
        ("asdiv", [Problem(0, "Ann has 9. How many?", "9")]),
        ("aime24", [Problem(0, "p", "025")]),
        ("amc", [Problem(0, "p", 142.0)]),
        ("math500", [Problem(0, "p", "p - q")]),
        ("minerva", [Problem(0, "p", "9.6")]),
        ("olympiad_bench", [Problem(0, "p", ["$2$"])]),
    ],
)
def test_named_sets(hub, name, problems):
    assert load_problems(name) == problems
    assert hub == [(HUB[name].repo, "main" if name == "gsm8k" else None)]


def test_every_name_is_tested():
    assert set(HUB) == {*BENCHMARKS, "math_12k", "math_lvl3to5", "gsm8k", "asdiv"}


def test_hub_name_with_split(hub):
    assert load_problems("someone/set:b") == [Problem(0, "in b", "2")]
    assert load_problems("someone/test-only") == [Problem(0, "p", "1")]
    with pytest.raises(UserError, match=r"no split 'train'.*it has a, b"):
        load_problems("someone/set")
    with pytest.raises(UserError, match=r"cannot load 'someone/sett'.*name the file"):
        load_problems("someone/sett")


@pytest.mark.parametrize("source", ["arithmetic", "arithmetic_heldout"])
def test_arithmetic(source):
    problems = load_problems(source)
    assert len(load_problems(source, limit=3)) == 3
    other = load_problems("arithmetic" if source != "arithmetic" else "arithmetic_heldout")
    assert problems and not {p.question for p in problems} & {p.question for p in other}


def test_a_bare_machine_trains_on_arithmetic_and_jsonl(tmp_path):
    source = jsonl(tmp_path / "set.jsonl", ROWS)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['datasets', 'pyarrow', 'math_verify', 'pebble']))\n"
        f"from drgrpo.data import load_problems; print(len(load_problems({source!r})), len(load_problems('arithmetic')) > 9)\n"
        "try: load_problems('math_12k')\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("3 True\n") and "pip install datasets" in run.stdout, run


# Mistakes.


def test_missing_file_names_its_neighbours(tmp_path):
    jsonl(tmp_path / "math_train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"math_trian.jsonl'.*beside it: math_train.jsonl"):
        load_problems(str(tmp_path / "math_trian.jsonl"))
    with pytest.raises(UserError, match="there is no folder"):
        load_problems(str(tmp_path / "nowhere" / "set.jsonl"))


def test_unknown_name_suggests_a_set():
    with pytest.raises(UserError, match=r"did you mean 'math_lvl3to5'\?"):
        load_problems("math_lvl3-5")


def test_unknown_file_type(tmp_path):
    with pytest.raises(UserError, match=r"unknown file type '.csv'; use .jsonl"):
        load_problems(write(tmp_path / "set.csv", "problem,answer"))


def test_unknown_field_names_the_nearest(tmp_path):
    source = jsonl(tmp_path / "set.jsonl", [{"problem": "1+1?", "answers": "2", "level": 1}])
    with pytest.raises(
        UserError,
        match=r"no field 'answer' \(did you mean 'answers'\?\); .* problem, answers, level",
    ):
        load_problems(source)
    with pytest.raises(UserError, match=r"no field 'question'"):
        load_problems(source, problem_field="question")


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
    with pytest.raises(
        UserError, match=r"7 of 9 rows have .* row 2, 4, 5, 6, 7 \.\.\. \(counted from 1\)"
    ):
        load_problems(source)


def test_broken_json_names_the_line(tmp_path):
    with pytest.raises(UserError, match=r"set.jsonl:2: broken JSON"):
        load_problems(
            write(tmp_path / "set.jsonl", json.dumps(ROWS[0]) + '\n{"problem": "1+1?", "answ\n')
        )
    with pytest.raises(UserError, match=r"set.json:3: broken JSON"):
        load_problems(write(tmp_path / "set.json", '[\n{"problem": "1+1?", "answer": "2"},\n]'))
    (tmp_path / "bytes.jsonl").write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(UserError, match=r"bytes.jsonl:1: broken JSON.*utf-8"):
        load_problems(str(tmp_path / "bytes.jsonl"))


def test_json_of_another_shape(tmp_path):
    with pytest.raises(UserError, match=r"set.jsonl:2: expected an object, found list"):
        load_problems(write(tmp_path / "set.jsonl", json.dumps(ROWS[0]) + "\n[1]\n"))
    with pytest.raises(UserError, match="list of objects"):
        load_problems(write(tmp_path / "set.json", json.dumps(ROWS[0])))


@pytest.mark.parametrize(
    ("name", "text"),
    [("set.jsonl", ""), ("set.jsonl", "\n\n"), ("set.json", ""), ("set.json", "[]")],
)
def test_empty_file(tmp_path, name, text):
    with pytest.raises(UserError, match="is empty"):
        load_problems(write(tmp_path / name, text))


# Steps.

TEN = [Problem(i, f"p{i}", str(i)) for i in range(10)]


def test_an_epoch_holds_every_problem_once_in_an_order_of_its_own():
    stream = [p.id for step in range(1, 9) for p in step_problems(TEN, step, 5, seed=0)]
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_may_span_epochs():
    stream = [p.id for step in range(1, 31) for p in step_problems(TEN, step, 7, seed=3)]
    assert stream == [p.id for step in range(1, 8) for p in step_problems(TEN, step, 30, seed=3)]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert len(step_problems(TEN, 1, 25, seed=3)) == 25


def test_steps_are_a_function_of_the_seed():
    assert step_problems(TEN, 5, 4, seed=1) == step_problems(TEN, 5, 4, seed=1)
    assert [step_problems(TEN, s, 10, seed=1) for s in (1, 2)] != [
        step_problems(TEN, s, 10, seed=2) for s in (1, 2)
    ]
    # An epoch of one seed is not the next epoch of another.
    assert step_problems(TEN, 2, 10, seed=1) != step_problems(TEN, 1, 10, seed=2)


# Contamination and benchmarks.


def test_overlap_sees_through_case_space_and_latex_spacing():
    train = [
        Problem(3, "Find $x,\\, y$  if\n\\quad $x = y$.", "1"),
        Problem(4, "Something else", "1"),
    ]
    evaluation = [Problem(7, "find $x,y$ if $x=y$.", "1"), Problem(8, "Find $x,z$ if $x=y$.", "1")]
    assert overlap(train, evaluation) == [(3, 7)]
    assert overlap(train[1:], evaluation) == []


def test_benchmark_source(tmp_path):
    source = jsonl(tmp_path / "amc.jsonl", ROWS)
    assert benchmark_source("amc", str(tmp_path)) == source
    assert benchmark_source("amc", None) == "amc"
    with pytest.raises(UserError, match=r"no aime24.jsonl in .*it holds amc.jsonl"):
        benchmark_source("aime24", str(tmp_path))
    with pytest.raises(UserError, match=r"'aime_24' \(did you mean 'aime24'\?\)"):
        benchmark_source("aime_24", None)


@pytest.mark.parametrize(
    ("name", "rows"), list(zip(BENCHMARKS, (30, 83, 500, 272, 675), strict=True))
)
def test_the_five_benchmarks(name, rows):
    if not (SHARED / "eval").exists():
        pytest.skip(f"no {SHARED}")
    problems = load_problems(benchmark_source(name, str(SHARED / "eval")))
    assert len(problems) == rows and [p.id for p in problems] == list(range(rows))


def test_the_odd_unusable_row_of_a_large_set_is_left_out_and_said(tmp_path):
    said = []
    rows = [{"problem": f"{i}+0?", "answer": str(i)} for i in range(2000)]
    rows[7] = {"problem": "7+0?", "answer": ""}
    rows[1500] = {"problem": "1500+0?", "answer": None}
    problems = load_problems(jsonl(tmp_path / "set.jsonl", rows), say=said.append)
    assert len(problems) == 1998 and [p.id for p in problems[6:8]] == [6, 8]
    assert (
        len(said) == 1
        and "2 of 2000 rows" in said[0]
        and "row 8, 1501 (counted from 1); left out" in said[0]
    )
    rows[1501] = {"problem": "1501+0?"}
    with pytest.raises(UserError, match="3 of 2000 rows"):
        load_problems(jsonl(tmp_path / "set.jsonl", rows), say=said.append)


def test_rows_without_an_answer_in_a_real_file():
    path, said = SHARED / "train/math_12k.jsonl", []
    if not path.exists():
        pytest.skip(f"no {path}")
    assert len(load_problems(str(path), say=said.append)) == 11995
    assert "5 of 12000 rows" in said[0] and "row 5342, 5344, 6628, 7302, 10671" in said[0]
