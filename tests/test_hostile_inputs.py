"""Whatever stands on the command line or in a file of the user's: it works, or it is one line.

`DRGRPO_FUZZ=10000 pytest tests/test_hostile_inputs.py` tries ten thousand inputs in all.
"""

import json
import os
from contextlib import chdir, suppress
from dataclasses import fields
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drgrpo import config, data
from drgrpo.config import Config
from drgrpo.evaluation import config as evaluation
from drgrpo.evaluation import responses
from drgrpo.evaluation.config import EvalConfig
from drgrpo.run import folder
from drgrpo.run.cli import flag
from drgrpo.templates import get_template
from drgrpo.types import UserError
from drgrpo.vllm_options import parse_vllm_options

TESTS = 8
EXAMPLES = int(os.environ.get("DRGRPO_FUZZ", 320)) // TESTS

hostile = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="DRGRPO_FUZZ" not in os.environ,  # CI tries the same ones every time
    suppress_health_check=list(HealthCheck),
)

LONG = "a" * 5000
WORDS = ["", " ", "\0", "\ud800", LONG, f"./{LONG}", "..", "/", "~", "nan", "inf", "-1", "1e999"]
WORDS += ["0", "9" * 30, "9" * 5000, "true", "None", "{q}", "[:80%]", "x[90%:10%]", "a:b:c", "%s"]
WORDS += ["math", "math + math", "0*x.py:f", "a/b/c.jsonl", "*", "📈", "{}", "[]", "[" * 9000]
word = st.sampled_from(WORDS) | st.text(max_size=12)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=3),
    max_leaves=6,
)


def one_line(call, *args, **kwargs):
    """The call succeeds, or says in one line that it does not."""
    with suppress(SystemExit):  # --help
        try:
            return call(*args, **kwargs)
        except UserError as error:
            message = str(error)
            assert message and "\n" not in message, message
            assert len(message) < 2000 + 3 * len(LONG), message


def flags(cls):
    return st.sampled_from([f"--{flag(field.name)}" for field in fields(cls)] + ["--no-such-flag"])


# ---- the command line


def check_training(argv):
    parsed = config.parse_args(argv)
    folder.check(parsed)
    data.check_sources(parsed)


@hostile
@given(st.lists(st.tuples(flags(Config), word), max_size=3))
def test_the_command_line_of_training(tmp_path_factory, pairs):
    argv = ["--recipe", "tiny", *(part for pair in pairs for part in pair)]
    with chdir(tmp_path_factory.getbasetemp()):  # where a relative path leads nowhere
        one_line(check_training, argv)


@hostile
@given(st.lists(st.tuples(flags(EvalConfig), word), max_size=3))
def test_the_command_line_of_evaluation(tmp_path_factory, pairs):
    argv = ["--benchmarks", "arithmetic_heldout", *(part for pair in pairs for part in pair)]
    with chdir(tmp_path_factory.getbasetemp()):
        one_line(evaluation.parse_args, argv)


# ---- files of the user's

CONTENTS = st.one_of(
    st.binary(max_size=60),
    value.map(lambda v: json.dumps(v).encode()),
    st.lists(value, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.sampled_from([b"", b"\n\n", b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe{}", b"PAR1" * 5]),
)
cell = value | st.sampled_from(["\ud800", "1", 1, 2.5, float("nan"), ["3", 4], 10**400])
row = st.fixed_dictionaries(
    {}, optional={"problem": cell, "answer": cell, "level": cell, "formula": cell}
)
ROWS = st.lists(row, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


@hostile
@given(CONTENTS | ROWS, st.sampled_from([".jsonl", ".json", ".parquet", ".csv", ""]), st.booleans())
def test_a_data_file(tmp_path_factory, content, suffix, share):
    path = tmp_path_factory.mktemp("data") / f"rows{suffix}"
    path.write_bytes(content)
    quiet = {"log": lambda message: None}
    one_line(data.load_problems, f"{path}[:50%]" if share else str(path), **quiet)


@hostile
@given(st.dictionaries(st.sampled_from(["state.json", "dataset_info.json", "x.arrow"]), CONTENTS))
def test_a_data_folder(tmp_path_factory, files):
    path = tmp_path_factory.mktemp("data")
    for name, content in files.items():
        (path / name).write_bytes(content)
    one_line(data.load_problems, str(path), log=lambda message: None)


@hostile
@given(st.binary(max_size=40) | word.map(lambda text: text.encode(errors="ignore")))
def test_a_template_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("template") / "prompt.txt"
    path.write_bytes(content)
    one_line(get_template, str(path))


@hostile
@given(CONTENTS, st.booleans())
def test_a_run_folder_and_a_model_folder(tmp_path_factory, content, tokenizer):
    path = tmp_path_factory.mktemp("run")
    (path / "config.json").write_bytes(content)
    if tokenizer:
        (path / "tokenizer.json").write_bytes(content)
    recipe = config.RECIPES["tiny"]()
    one_line(folder.check, config.replace(recipe, out=str(path)))
    one_line(config.check_model, str(path))


GOOD = {"benchmark": "b", "template": "t", "temperature": 0.0, "id": 0, "sample": 0, "problem": "q"}
GOOD |= {"answer": "1", "response": "r", "score": 1.0, "parsed": True, "vote": None, "tokens": 3}
GOOD |= {"finished": True}


def evaluate_again(path: Path):
    """What eval.py does with an evaluation that is there."""
    rows = responses.read(path)
    responses.recorded(path)
    return responses.groups(rows)


@hostile
@given(st.sampled_from(sorted(GOOD)), cell, CONTENTS)
def test_an_evaluation_that_is_there(tmp_path_factory, name, cell, content):
    path = tmp_path_factory.mktemp("eval")
    (path / "responses.jsonl").write_text(json.dumps(GOOD | {name: cell}))
    (path / "eval.json").write_bytes(content)
    one_line(evaluate_again, path)
    (path / "responses.jsonl").write_bytes(content)
    one_line(evaluate_again, path)


@hostile
@given(value.map(json.dumps) | word)
def test_further_arguments_of_vllm(text):
    one_line(parse_vllm_options, text)
