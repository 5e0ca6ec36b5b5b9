"""Problems: where they come from, what is wrong with them, and which of them a step trains on.

A source is one of these: a file (.jsonl, .json or .parquet), a folder that `datasets.save_to_disk`
wrote, a name on the Hugging Face hub, or a name in `HUB` or `ARITHMETIC`. A folder or a hub name
may end in `:split`. Any source may end in a share, as in `data.jsonl[:80%]` to train on and
`data.jsonl[80%:]` to evaluate on. Only hub names, folders and Parquet need the `datasets` library.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from drgrpo.answers import formula_value
from drgrpo.tiny import arithmetic
from drgrpo.types import (
    Answer,
    Problem,
    UserError,
    check_name,
    check_path,
    comma_list,
    is_utf8,
    nearest,
    parse_json,
)

if TYPE_CHECKING:
    from drgrpo.config import Config

Rows = list[dict[str, Any]]

BENCHMARKS = ("aime24", "amc", "math500", "minerva", "olympiad_bench")
"""The paper's."""

EVAL_SETS = {name: name for name in (*BENCHMARKS, "aime25")} | {"gsm8k": "gsm8k_test"}
"""Benchmark that `eval.py` knows by name -> its name in `HUB`."""

ARITHMETIC = {"arithmetic": "train", "arithmetic_heldout": "heldout"}
"""Generated problems: source -> `split` of `drgrpo.tiny.arithmetic.problems`."""

MAX_UNUSABLE = 0.001
"""Share of rows that may be left out. A larger share is a mistake in the file or in its fields."""


@dataclass(frozen=True, slots=True)
class Columns:
    """How a row becomes a problem. The question is the cells of `problem`, joined by spaces. `read`
    finds the ground truth in the cell of `answer`. `keep` selects the rows of the set."""

    problem: tuple[str, ...] = ("problem",)
    answer: str = "answer"
    read: Callable[[Any], Any] = lambda cell: cell
    keep: Callable[[dict[str, Any]], bool] = lambda row: True

    def parse(self, id: int, row: dict[str, Any]) -> Problem | None:
        """None for a row without question or answer."""
        question = " ".join(str(row.get(field) or "") for field in self.problem)
        answer = _answer(row.get(self.answer), self.read)
        if not question.strip() or not is_utf8(question) or answer is None:
            return None
        others = {k: cell for k, cell in row.items() if k not in (*self.problem, self.answer)}
        return Problem(id, question, answer, columns=others)


@dataclass(frozen=True, slots=True)
class HubSet:
    repo: str
    split: str
    columns: Columns = Columns()
    config: str | None = None


def _level(row: dict[str, Any]) -> int:
    return int(str(row["level"]).split()[-1])  # "Level 5" or 5


def _without_unit(answer: str) -> str:
    return answer.partition("(")[0].strip()  # "9 (apples)"


def _is_formula(row: dict[str, Any]) -> bool:
    """Whether the formula, such as "7+2=9", has the answer as its value."""
    return formula_value(row["formula"]) == _without_unit(row["answer"])


# Some rows have several answers ("3; 5").
_ASDIV = Columns(
    ("body", "question"), read=_without_unit, keep=lambda row: ";" not in row["answer"]
)

# The worked solution ends in "#### answer".
_GSM8K = Columns(("question",), read=lambda text: text.rpartition("####")[2].strip())

HUB = {
    # 12 000 rows: MATH without the 500 problems of MATH500, so that training never sees them.
    "math_12k": HubSet("rasbt/math_full_minus_math500", "train"),
    # 8 888 rows of math_12k. The paper's own selection is 8 523 of them.
    "math_lvl3to5": HubSet(
        "rasbt/math_full_minus_math500", "train", Columns(keep=lambda row: _level(row) in (3, 4, 5))
    ),
    # 7 473 and 1 319 rows. The paper's copy of the first holds the second too: never use that copy.
    "gsm8k": HubSet("openai/gsm8k", "train", _GSM8K, config="main"),
    "gsm8k_test": HubSet("openai/gsm8k", "test", _GSM8K, config="main"),
    # 2 305 rows, of which the second keeps those that a formula solves.
    "asdiv": HubSet("EleutherAI/asdiv", "validation", _ASDIV),
    "asdiv_formulas": HubSet("EleutherAI/asdiv", "validation", replace(_ASDIV, keep=_is_formula)),
    # 30, 30, 83, 500, 272 and 674 rows. aime24 pads its answers with zeros ("025"). amc is AMC 12
    # of 2022 and 2023, with floats as answers. The answers of olympiad_bench are lists, and the
    # paper's copy has 675 rows.
    "aime24": HubSet("HuggingFaceH4/aime_2024", "train"),
    "aime25": HubSet("math-ai/aime25", "test"),
    "amc": HubSet("AI-MO/aimo-validation-amc", "train"),
    "math500": HubSet("HuggingFaceH4/MATH-500", "test"),
    "minerva": HubSet("math-ai/minervamath", "test", Columns(("question",))),
    "olympiad_bench": HubSet(
        "math-ai/olympiadbench", "test", Columns(("question",), "final_answer")
    ),
}


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a set. A hash puts each question at a place between 0 and 100 percent, and the
    share is the problems from `start` to `end`. So equal questions are in one share, and neither
    the order of the rows nor the other rows matter."""

    name: str
    start: int = 0
    end: int = 100

    @classmethod
    def of(cls, source: str) -> Share:
        """`data.jsonl[25%:75%]`, or a whole set. UserError for a share that is empty or not in
        percent."""
        brackets = re.fullmatch(r"(.+)\[([^\[\]]*:[^\[\]]*)\]", source)
        if not brackets:
            return cls(source)
        ends = re.fullmatch(r"(?:(\d+)%)?:(?:(\d+)%)?", brackets[2])
        if not ends or not int(ends[1] or 0) < int(ends[2] or 100) <= 100:
            raise UserError(f"{source} must end in a share such as [:80%] or [25%:75%]")
        return cls(brackets[1], int(ends[1] or 0), int(ends[2] or 100))

    def holds(self, problem: Problem) -> bool:
        question = _normalize(problem.question).encode()
        place = int.from_bytes(hashlib.blake2b(question, digest_size=8).digest()) / 2**64
        return self.start <= 100 * place < self.end


def share_before(source: str) -> str:
    """The problems before those of `source`, which a supervised phase may see. UserError if there
    are none."""
    share = Share.of(source)
    if not share.start:
        raise UserError(
            f"--model smol imitates the problems before those of --train-data {source}, and there "
            "are none; leave it a share, as in --train-data 'data.jsonl[25%:75%]'"
        )
    return f"{share.name}[:{share.start}%]"


def check_sources(config: Config) -> None:
    """Raise the errors of `load_sets` that are known at once. Local JSON files are read in full. Of
    hub names, folders and Parquet only the spelling is checked. Needs no `datasets` library."""
    if config.model == "smol":
        share_before(config.train_data)
    for source, columns in _sources(config):
        name = Share.of(source).name
        if name not in ARITHMETIC and _reader(name).func in (_jsonl_rows, _json_rows):
            load_problems(source, columns, log=lambda message: None)


def load_sets(
    config: Config, log: Callable[[str], None]
) -> tuple[list[Problem], dict[str, list[Problem]]]:
    """The training problems, and the problems of each evaluation set by its source."""

    def log_data(message: str) -> None:
        log(f"data: {message}")

    (_, train), *evaluation = [
        (source, load_problems(source, columns, log_data)) for source, columns in _sources(config)
    ]
    return train, dict(evaluation)


def _sources(config: Config) -> list[tuple[str, Columns]]:
    """The training set with its columns, then the evaluation sets."""
    columns = Columns((config.problem_field,), config.answer_field)
    evaluation = [(source, Columns()) for source in comma_list(config.eval_data)]
    return [(config.train_data, columns), *evaluation]


def load_problems(
    source: str, columns: Columns = Columns(), log: Callable[[str], None] = print
) -> list[Problem]:
    """The problems of `source`. `id` is the row in the set, counted from 0 before `keep`. The sets
    in `HUB` have their own columns.

    UserError for a missing file, set, split, share or field, for broken JSON, and for a set without
    rows.
    UserError for rows without question or answer, unless they are at most `MAX_UNUSABLE` of the
    set. These few are left out and logged: MATH-12K has 5 of 12 000.
    """
    share = Share.of(source)
    problems = _whole_set(share.name, columns, log)
    kept = [problem for problem in problems if share.holds(problem)]
    if not kept:
        raise UserError(f"{source} is empty: none of its {len(problems)} problems is in the share")
    return kept


def _whole_set(source: str, columns: Columns, log: Callable[[str], None]) -> list[Problem]:
    if source in ARITHMETIC:
        return arithmetic.problems(ARITHMETIC[source])
    if source in HUB:
        columns = HUB[source].columns
    rows = _reader(source)()
    if not rows:
        raise UserError(f"{source} is empty: it holds no rows")
    _check_fields(source, rows[0], (*columns.problem, columns.answer))
    parsed = {id: columns.parse(id, row) for id, row in enumerate(rows) if columns.keep(row)}
    problems = [problem for problem in parsed.values() if problem]
    if len(problems) < len(parsed):
        numbers = [id + 1 for id, problem in parsed.items() if problem is None]
        message = (
            f"{source}: {len(numbers)} of {len(rows)} rows have no question in "
            f"{'+'.join(columns.problem)!r} or no answer in {columns.answer!r}: row "
            f"{', '.join(map(str, numbers[:5]))}{' ...' * (len(numbers) > 5)} (counted from 1)"
        )
        if len(numbers) > MAX_UNUSABLE * len(rows):
            raise UserError(f"{message}. Remove or complete them")
        log(f"{message}; left out")
    return problems


def step_problems(
    problems: list[Problem], step: int, prompts_per_step: int, seed: int
) -> list[Problem]:
    """The problems of step `step` (from 1). An epoch is a permutation that depends on (seed, epoch)
    only. The steps cut the endless row of epochs into equal pieces. So there is no state to save,
    and every number of processes sees the same. A step that spans epochs can hold a problem
    twice."""
    start = (step - 1) * prompts_per_step
    chosen: list[Problem] = []
    while len(chosen) < prompts_per_step:
        epoch, offset = divmod(start + len(chosen), len(problems))
        order = np.random.default_rng((seed, epoch)).permutation(len(problems))
        chosen += [problems[i] for i in order[offset : offset + prompts_per_step - len(chosen)]]
    return chosen


def overlap(train: Iterable[Problem], evaluation: Iterable[Problem]) -> list[tuple[int, int]]:
    """(train id, evaluation id) of every question that is in both. Case, white space and LaTeX
    spacing do not count."""
    ids: dict[str, list[int]] = {}
    for problem in train:
        ids.setdefault(_normalize(problem.question), []).append(problem.id)
    return [(id, p.id) for p in evaluation for id in ids.get(_normalize(p.question), [])]


def benchmark_source(name: str, data_dir: str | None) -> str:
    """The source of a benchmark: DATA_DIR/NAME.jsonl, or the hub if there is no `data_dir`."""
    check_name("benchmark", name, EVAL_SETS)
    if data_dir is None:
        return EVAL_SETS[name]
    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in {data_dir}; {_listing(path.parent)}")
    return str(path)


def _normalize(question: str) -> str:
    spacing = r"\\[,;:!> ]|\\(?:quad|qquad|thinspace|medspace|thickspace|enspace)(?![a-zA-Z])|~|\s+"
    return re.sub(spacing, "", question).lower()


def _answer(cell: Any, read: Callable[[Any], Any]) -> Answer | None:
    """The ground truth in a cell, or None if it holds none."""
    if isinstance(cell, list | tuple):
        answers = [_answer(member, read) for member in cell]
        return [str(answer) for answer in answers] if answers and None not in answers else None
    if isinstance(cell, str):
        return read(cell) if read(cell).strip() else None
    is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
    return cell if is_number and abs(cell) <= sys.float_info.max else None


def _check_fields(source: str, row: dict[str, Any], fields: Iterable[str]) -> None:
    for field in fields:
        if field not in row:
            raise UserError(
                f"{source} has no field {field!r}; {nearest(field, row)}its fields are "
                f"{', '.join(map(str, row))} (set --problem-field and --answer-field)"
            )


def _reader(source: str) -> partial[Rows]:
    """The call that reads a source. UserError if there is no such source."""
    if source in HUB:
        return partial(_hub_rows, HUB[source].repo, HUB[source].split, HUB[source].config)
    check_path("data:", source)
    name, split = source, None
    if ":" in source and not Path(source).exists():
        name, _, split = source.rpartition(":")
    path = Path(name)
    if path.is_dir():
        return partial(_folder_rows, path, split)
    reader = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}.get(
        path.suffix
    )
    if path.is_file() and reader:
        return partial(reader, path)
    if path.is_file():
        raise UserError(f"{name}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet")
    if reader or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(_no_data(path))
    return partial(_hub_rows, name, split)


def _no_data(path: Path) -> str:
    folder, names = path.parent, [*HUB, *ARITHMETIC]
    files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    missing = f"no {path.name!r} in {folder}" if folder.is_dir() else f"there is no folder {folder}"
    hint = nearest(path.name, [*names, *files])
    return f"no data at '{path}': {missing}; {hint}sets known by name are {', '.join(names)}"


def _jsonl_rows(path: Path) -> Rows:
    with open(path, "rb") as file:
        numbered = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    rows = {number: _parse(path, line, number) for number, line in numbered}
    for number, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected an object, found {type(row).__name__}")
    return list(rows.values())


def _json_rows(path: Path) -> Rows:
    text = path.read_bytes()
    rows = _parse(path, text, 1) if text.strip() else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path} must hold a list of objects, one a problem; one object a line is .jsonl"
        )
    return rows


def _parse(path: Path, text: bytes, line: int) -> Any:
    """The JSON value in `text`, which starts at line `line` of the file."""
    try:
        return parse_json(text)
    except ValueError as error:  # broken JSON or broken UTF-8
        number = line + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{number}: broken JSON: {error}") from error


def _parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow: pip install datasets (or convert it to .jsonl)"
        ) from error
    try:
        return read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path} is broken or no Parquet file: {error}") from error


def _folder_rows(path: Path, split: str | None) -> Rows:
    datasets = _datasets(str(path))
    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not a folder that datasets.save_to_disk wrote; {_listing(path)}"
        ) from error
    except Exception as error:  # `datasets` passes on what the readers of its files raise
        name = type(error).__name__
        raise UserError(f"{path} is a broken folder of datasets: {name}: {error}") from error
    return _split_rows(str(path), data, split)


def _hub_rows(repo: str, split: str | None, config: str | None = None) -> Rows:
    try:
        data = _datasets(repo).load_dataset(repo, config)
    except (OSError, ValueError) as error:  # not found, gated, offline, no such configuration
        raise UserError(
            f"cannot load {repo!r} from the Hugging Face hub: {error}. Download it and name the "
            "file instead"
        ) from error
    return _split_rows(repo, data, split)


def _split_rows(source: str, data: Any, split: str | None) -> Rows:
    """The rows of one split. Without `split`: of the only split, or of "train"."""
    if not isinstance(data, dict):
        if split is not None:
            raise UserError(f"{source} holds a single set, without splits; leave out ':{split}'")
        return data.to_list()
    if split is None:
        split = next(iter(data)) if len(data) == 1 else "train"
    check_name(f"split of {source}:", split, data)
    return data[split].to_list()


def _datasets(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"loading {source} needs the datasets library: pip install datasets (or use .jsonl)"
        ) from error
    return datasets


def _listing(folder: Path) -> str:
    """What a folder holds, for an error message."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:20]) or 'nothing'}{' ...' * (len(names) > 20)}"
