"""Problems: where they come from, what is wrong with them, and which of them each step trains on.

A source is a file (.jsonl, .json, .parquet), a folder written by `datasets.save_to_disk`, a Hugging
Face hub name, or one of the names in `HUB` and `ARITHMETIC`. A folder or a hub name may end in
`:split`. Only hub names, folders and Parquet need the `datasets` library; the rest runs on the
standard library.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drgrpo.types import Answer, Problem, UserError

BENCHMARKS = ("aime24", "amc", "math500", "minerva", "olympiad_bench")

ARITHMETIC = {"arithmetic": "train", "arithmetic_heldout": "heldout"}
"""Generated problems, source to the `part` of `drgrpo.tiny.arithmetic.problems`."""


@dataclass(frozen=True, slots=True)
class HubSet:
    """A set on the hub: repository, split and configuration, its two fields, the rows to `keep`,
    and how to `read` the answer in a cell. `problem` may name several fields, joined by a space."""

    repo: str
    split: str
    config: str | None = None
    problem: tuple[str, ...] = ("problem",)
    answer: str = "answer"
    keep: Callable[[dict], bool] = lambda row: True
    read: Callable[[Answer], Answer] = lambda answer: answer


def _level(row: dict) -> int:
    return int(str(row["level"]).split()[-1])  # "Level 5" or 5


HUB = {
    # MATH minus the 500 problems of MATH500: 12 000 rows, so that training never sees the
    # benchmark.
    "math_12k": HubSet("rasbt/math_full_minus_math500", "train"),
    # Levels 3 to 5 of it: 8 888 rows. The paper's own selection is 8 523 of these.
    "math_lvl3to5": HubSet(
        "rasbt/math_full_minus_math500", "train", keep=lambda row: _level(row) in (3, 4, 5)
    ),
    # 7 473 rows; the worked solution ends in "#### answer". The paper's copy holds the test split
    # too: never use that.
    "gsm8k": HubSet(
        "openai/gsm8k",
        "train",
        "main",
        problem=("question",),
        read=lambda text: text.rpartition("####")[2].strip(),
    ),
    # 2 305 rows, all in "validation"; answers such as "9 (apples)". Several numbers ("3; 5") do not
    # make one answer.
    "asdiv": HubSet(
        "EleutherAI/asdiv",
        "validation",
        problem=("body", "question"),
        keep=lambda row: ";" not in row["answer"],
        read=lambda text: text.partition("(")[0].strip(),
    ),
    "aime24": HubSet("HuggingFaceH4/aime_2024", "train"),  # 30 rows, answers zero-padded: "025"
    "amc": HubSet(
        "AI-MO/aimo-validation-amc", "train"
    ),  # 83 rows (AMC 12 of 2022 and 2023), answers are floats
    "math500": HubSet("HuggingFaceH4/MATH-500", "test"),  # 500 rows
    "minerva": HubSet("math-ai/minervamath", "test", problem=("question",)),  # 272 rows
    # 674 rows, `final_answer` is a list. The paper's copy has 675.
    "olympiad_bench": HubSet(
        "math-ai/olympiadbench", "test", problem=("question",), answer="final_answer"
    ),
}


MAX_UNUSABLE = 0.001  # share of rows that may be left out; more of them are a mistake in the file or in its fields


def load_problems(
    source: str,
    *,
    problem_field: str = "problem",
    answer_field: str = "answer",
    limit: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Problem]:
    """The problems of `source`, or the first `limit`. `id` is the row in the set, counted from 0
    before any filter.

    UserError, with the way out, for: no such file, set, split or field; broken JSON (with its
    line); no rows; rows that lack a question or an answer (how many, and the first of them). The
    odd row of a large set that lacks one is left out, and `say` is told: MATH-12K has 5 of 12 000.
    """
    if source in ARITHMETIC:
        from drgrpo.tiny.arithmetic import problems

        return problems(ARITHMETIC[source])[:limit]
    if source in HUB:
        spec = HUB[source]
        rows = _hub_rows(spec.repo, spec.split, spec.config)
    else:
        spec = HubSet(source, "", problem=(problem_field,), answer=answer_field)
        rows = _rows(source)
    if not rows:
        raise UserError(f"{source} is empty: it holds no rows")
    _check_fields(source, rows[0], (*spec.problem, spec.answer))
    problems, bad = [], []
    for id, row in enumerate(rows):
        if not spec.keep(row):
            continue
        question = " ".join(str(row.get(field) or "") for field in spec.problem)
        answer = _answer(row.get(spec.answer), spec.read)
        if question.strip() and answer is not None:
            problems.append(Problem(id, question, answer))
        else:
            bad.append(id + 1)
    if bad:
        what = (
            f"{source}: {len(bad)} of {len(rows)} rows have no question in {'+'.join(spec.problem)!r} or no answer in "
            f"{spec.answer!r}: row {', '.join(map(str, bad[:5]))}{' ...' if len(bad) > 5 else ''} (counted from 1)"
        )
        if len(bad) > MAX_UNUSABLE * len(rows):
            raise UserError(f"{what}. Remove or complete them")
        say(f"{what}; left out")
    return problems[:limit]


def step_problems(
    problems: list[Problem], step: int, prompts_per_step: int, seed: int
) -> list[Problem]:
    """The problems of step `step` (from 1). An epoch is a permutation that depends on (seed, epoch)
    only, and the steps cut the endless row of epochs into equal pieces: no state to save, the same
    for every number of ranks. A step may span epochs, so it can hold a problem twice."""
    start = (step - 1) * prompts_per_step
    picked: list[Problem] = []
    while len(picked) < prompts_per_step:
        epoch, offset = divmod(start + len(picked), len(problems))
        order = np.random.default_rng((seed, epoch)).permutation(len(problems))
        picked += [problems[i] for i in order[offset : offset + prompts_per_step - len(picked)]]
    return picked


def overlap(train: Iterable[Problem], evaluation: Iterable[Problem]) -> list[tuple[int, int]]:
    """(train id, evaluation id) of every question that is in both, whatever its case, white space
    and LaTeX spacing."""
    by_question: dict[str, list[int]] = {}
    for problem in train:
        by_question.setdefault(_same(problem.question), []).append(problem.id)
    return [
        (id, problem.id)
        for problem in evaluation
        for id in by_question.get(_same(problem.question), [])
    ]


def benchmark_source(name: str, data_dir: str | None) -> str:
    """Where `load_problems` finds a benchmark: DATA_DIR/NAME.jsonl, or the hub if there is no
    `data_dir`."""
    if name not in BENCHMARKS:
        raise UserError(
            f"unknown benchmark {name!r}{_nearest(name, BENCHMARKS)}; there are: {', '.join(BENCHMARKS)}"
        )
    if data_dir is None:
        return name
    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in {data_dir}; {_listing(Path(data_dir))}")
    return str(path)


def _same(question: str) -> str:
    spacing = r"\\[,;:!> ]|\\(?:quad|qquad|thinspace|medspace|thickspace|enspace)(?![a-zA-Z])|~|\s+"
    return re.sub(spacing, "", question).lower()


def _answer(cell, read: Callable[[Answer], Answer]) -> Answer | None:
    """The ground truth in a cell, or None if it holds none."""
    if isinstance(cell, list | tuple):
        answers = [_answer(member, read) for member in cell]
        return [str(answer) for answer in answers] if answers and None not in answers else None
    if isinstance(cell, str):
        return read(cell) if read(cell).strip() else None
    is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
    return cell if is_number and math.isfinite(cell) else None


def _check_fields(source: str, row: dict, fields: Iterable[str]) -> None:
    for field in fields:
        if field not in row:
            raise UserError(
                f"{source} has no field {field!r}{_nearest(field, row)}; its fields are {', '.join(map(str, row))} "
                "(set problem_field and answer_field)"
            )


def _rows(source: str) -> list[dict]:
    path, split = Path(source), None
    if not path.exists() and ":" in source:
        source, _, split = source.rpartition(":")
        path = Path(source)
    if path.is_dir():
        return _folder_rows(path, split)
    reader = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}.get(
        path.suffix
    )
    if reader and path.is_file():
        return reader(path)
    if path.is_file():
        raise UserError(
            f"{source}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet"
        )
    if reader or source.count("/") != 1 or source.startswith((".", "/", "~")):
        names = (*HUB, *ARITHMETIC)
        known = f"nor a set known by name ({', '.join(names)}){_nearest(source, names)}"
        raise UserError(
            f"no data at {source!r}: no such file or folder ({_listing(path.parent, path.name)}), {known}"
        )
    return _hub_rows(source, split)


def _jsonl_rows(path: Path) -> list[dict]:
    with open(path, "rb") as file:
        rows = {
            number: _parse(path, line, number)
            for number, line in enumerate(file, 1)
            if line.strip()
        }
    for number, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object, found {type(row).__name__}")
    return list(rows.values())


def _json_rows(path: Path) -> list[dict]:
    rows = _parse(path, path.read_bytes(), 1)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path} must hold a list of objects, one a problem; one object a line is .jsonl"
        )
    return rows


def _parse(path: Path, text: bytes, line: int):
    """The JSON value in `text`, which starts at line `line` of the file."""
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except ValueError as error:  # broken JSON or broken UTF-8
        raise UserError(
            f"{path}:{line + getattr(error, 'lineno', 1) - 1}: broken JSON: {error}"
        ) from error


def _parquet_rows(path: Path) -> list[dict]:
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow: pip install datasets (or convert it to .jsonl)"
        ) from error
    return read_table(path).to_pylist()


def _folder_rows(path: Path, split: str | None) -> list[dict]:
    try:
        data = _datasets(str(path)).load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not a folder that datasets.save_to_disk wrote; {_listing(path)}"
        ) from error
    return _split_rows(str(path), data, split)


def _hub_rows(repo: str, split: str | None, config: str | None = None) -> list[dict]:
    try:
        data = _datasets(repo).load_dataset(repo, config)
    except (OSError, ValueError) as error:  # not found, gated, offline, no such configuration
        raise UserError(
            f"cannot load {repo!r} from the Hugging Face hub: {error}. Download it and name the file instead"
        ) from error
    return _split_rows(repo, data, split)


def _split_rows(source: str, data, split: str | None) -> list[dict]:
    """The rows of one split; without `split`, of the only one there is or of "train"."""
    if not isinstance(data, dict):
        if split is not None:
            raise UserError(f"{source} holds a single set, without splits; leave out ':{split}'")
        return data.to_list()
    splits = list(data)
    wanted = split if split is not None else "train" if len(splits) > 1 else splits[0]
    if wanted not in data:
        raise UserError(
            f"{source} has no split {wanted!r}{_nearest(wanted, splits)}; it has {', '.join(splits)}"
        )
    return data[wanted].to_list()


def _datasets(source: str):
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"loading {source} needs the datasets library: pip install datasets (or use .jsonl)"
        ) from error
    return datasets


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _listing(folder: Path, near: str | None = None) -> str:
    """What is in a folder, for an error message: the names like `near`, or all of them."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    if near is not None:
        similar = difflib.get_close_matches(near, names, n=3)
        return f"beside it: {', '.join(similar)}" if similar else f"nothing like it in {folder}"
    return (
        f"it holds {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
        if names
        else f"{folder} is empty"
    )
