"""What a call of `eval.py` asks for: the settings of an evaluation and the command line.

This file imports no torch, so that a mistake on the command line is answered at once.
"""

import math
from argparse import SUPPRESS
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from drgrpo import data, reward
from drgrpo.config import check_model
from drgrpo.evaluation import responses
from drgrpo.run.cli import Parser, check_choices, check_texts, flag
from drgrpo.run.folder import check_writable
from drgrpo.templates import AnswerRule, Template, get_template
from drgrpo.types import Problem, UserError, check_divides, comma_list, world_size
from drgrpo.vllm_options import parse_vllm_options

MAY_CHANGE_ON_RESUME = {"out", "data_dir", "sampler_batch", "kv_cache_gb", "write_every", "seeds"}
"""An interrupted evaluation may continue with other values of these fields."""

FLAGS_OF_MODE = {"compare": {"out"}, "regrade": {"grader", "answer", "out"}, "analyze": {"out"}}
"""The modes that need no model, and the fields that each of them takes."""


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    # what is evaluated
    model: str = ""
    """Hugging Face folder or hub name; --compare, --regrade and --analyze can do without"""
    benchmarks: str = "aime24,amc,math500,minerva,olympiad_bench"
    """comma-separated: these, aime25, gsm8k (its test split), or a source as for --train-data"""
    data_dir: str = ""
    """folder with NAME.jsonl for each of these names; empty: the hub"""
    template: str = "qwen_math"
    """question -> prompt: a name in drgrpo/templates.py, a file, or a text with {q}"""
    templates: str = ""
    """several names or files, comma-separated, one after the other, instead of --template"""
    system: str = ""
    """system message of --template chat"""
    answer: AnswerRule = "auto"
    """where the answer stands: see drgrpo/answers.py; auto is the template's own rule"""
    reward: str = "math"
    """reported beside the accuracy: as train.py --reward, see docs/rewards.md"""
    grader: Literal["correct", "paper"] = "correct"
    """paper: the reference's grading, with its slips on Minerva's trailing newlines"""

    # sampling
    temperature: float = 0.0
    """0 is greedy"""
    temperatures: str = ""
    """several temperatures, comma-separated, one after the other, instead of --temperature"""
    samples: int = 1
    """answers per problem: accuracy is their mean (mean@k), with pass@k and maj@k beside it"""
    max_new_tokens: int = 3000
    """generation budget; prompt and answer together also end at the model's positions"""
    seed: int = 0
    """seed of the samples"""
    seeds: int = 1
    """repeat with this many seeds, from --seed on, in OUT/seed-S; OUT/seeds.json has mean and sd"""

    # machine
    engine: Literal["auto", "torch", "vllm"] = "auto"
    """sampler: vllm, or torch; auto is vllm on CUDA and torch elsewhere"""
    dtype: Dtype = "auto"
    """auto is bfloat16 on CUDA and float32 elsewhere"""
    sampler_batch: int = 256
    """sequences that a sampler runs at once, per process"""
    tp: int = 1
    """processes that share one vLLM engine, for models that one GPU cannot sample"""
    kv_cache_gb: float = 0.0
    """vLLM's KV cache per process; 0: what 0.9 of the GPU leaves, or 0.25 without a GPU"""
    batch_invariant: bool = False
    """vLLM on a GPU: answers do not depend on their batch, not even by rounding; slower"""
    speculate: Literal["none", "ngram"] = "none"
    """ngram: vLLM on a GPU drafts the last answers from the text so far, as train.py --speculate"""
    vllm: str = ""
    """further arguments of vLLM's LLM(...) as JSON, such as {"enforce_eager": true}"""

    # output
    write_every: int = 1024
    """responses per process between two writes of responses.jsonl: what an interruption can cost"""
    out: str = ""
    """folder for what is written (default: MODEL/eval, or runs/eval/NAME for a hub name)"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_texts(self)
        for name in ("samples", "max_new_tokens", "sampler_batch", "write_every", "tp", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be at least 1")
        for temperature in self.all_temperatures:
            if not 0 <= temperature < math.inf:
                raise UserError(
                    f"temperature {temperature} must be 0, which is greedy, or a positive number"
                )
            for name in ("samples", "seeds"):
                if temperature == 0 and getattr(self, name) > 1:
                    raise UserError(
                        f"--{name} {getattr(self, name)} greedy answers would all be the same; "
                        "add --temperature 1"
                    )
        self.load_templates()
        parse_vllm_options(self.vllm)

    def load_templates(self) -> list[Template]:
        """Those of --templates, or the one of --template. UserError for an unknown one."""
        names = comma_list(self.templates) or [self.template]
        return [get_template(name, self.answer, self.system) for name in names]

    @property
    def all_temperatures(self) -> list[float]:
        try:
            return [float(t) for t in comma_list(self.temperatures)] or [self.temperature]
        except ValueError as error:
            raise UserError(
                f"--temperatures {self.temperatures} must be numbers with commas between them, "
                "as 0.2,0.6,1"
            ) from error

    @property
    def folder(self) -> Path:
        """Where the evaluation writes."""
        if self.out:
            return Path(self.out)
        if Path(self.model).is_dir():
            return Path(self.model, "eval")
        return Path("runs/eval", self.model.replace("/", "--"))


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of `eval.py`.

    mode: "evaluate", or one of `FLAGS_OF_MODE`. paths: the runs or the file that the mode reads. A
    path beside "evaluate" is the run, or "paper", that the scores are compared with.
    sets: the benchmarks, loaded. notices: what the log must tell about them."""

    mode: str
    config: EvalConfig
    paths: list[str]
    sets: dict[str, list[Problem]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def by_seed(self) -> list["Command"]:
        """A call for each of --seeds, as if it were made with --seed S --out OUT/seed-S."""
        config = self.config
        if config.seeds == 1:
            return [self]
        calls = []
        for seed in range(config.seed, config.seed + config.seeds):
            out = str(config.folder / f"seed-{seed}")
            calls.append(replace(self, config=replace(config, seed=seed, seeds=1, out=out)))
        return calls


def parse_args(argv: list[str] | None = None) -> Command:
    """The call that the command line asks for. UserError if it cannot be done."""
    parser = Parser(
        EvalConfig,
        prog="eval.py",
        description="Score a model on math benchmarks, and say whether a difference is noise.",
    )
    modes = parser.add_argument_group("what exists already")
    for name, word, count, text in (
        ("compare", "RUN", "+", "compare two runs, or a run and `paper`; one next to --model"),
        ("regrade", "FILE", 1, "grade a responses.jsonl again, into another folder"),
        ("analyze", "FILE", 1, "the base-model analyses of a responses.jsonl"),
    ):
        modes.add_argument(f"--{name}", metavar=word, nargs=count, default=SUPPRESS, help=text)
    given = parser.parse(argv)
    paths = {name: given.pop(name) for name in FLAGS_OF_MODE if name in given}
    if given.get("model") and paths.keys() <= {"compare"}:
        check_model(given["model"])
        config = EvalConfig(**given)
        check_divides(world_size(), tp=config.tp)
        return evaluation(config, paths.get("compare", []))
    if len(paths) != 1:
        raise UserError(
            "name a --model to evaluate, or one of --compare RUN RUN, --regrade FILE and "
            "--analyze FILE"
        )
    ((mode, files),) = paths.items()
    if unused := given.keys() - FLAGS_OF_MODE[mode]:
        flags = ", ".join(f"--{flag(name)}" for name in sorted(unused))
        raise UserError(f"--{mode} samples nothing: leave out {flags}")
    if mode == "compare" and (len(files) != 2 or set(files) == {"paper"}):
        raise UserError(
            f"--compare {' '.join(files)} must name two, RUN_A RUN_B or RUN paper, or one next to "
            "--model"
        )
    config = EvalConfig(**given)
    for path in files:
        if path != "paper":
            responses.read(path)
    return Command(mode=mode, config=config, paths=files)


def evaluation(config: EvalConfig, against: list[str]) -> Command:
    """The call that evaluates a model. Loads the benchmarks."""
    if len(against) > 1:
        raise UserError(
            f"--compare {' '.join(against)} with --model takes one name: its own run is the other"
        )
    if against and config.seeds > 1:
        raise UserError(
            f"--compare takes one evaluation, and --seeds {config.seeds} makes several; compare "
            f"one afterwards: --compare {config.folder}/seed-{config.seed} {against[0]}"
        )
    if against not in ([], ["paper"]):
        responses.read(*against)  # complete? It is needed when the scores are there, hours later.
    check_writable(config.folder)
    reward.check(config.reward)
    names = comma_list(config.benchmarks)
    if not names:
        raise UserError("--benchmarks is empty; name one of " + ", ".join(data.EVAL_SETS))
    if against == ["paper"] and not set(names) & set(data.BENCHMARKS):
        raise UserError(
            f"--compare paper: the paper has no scores on {config.benchmarks}; it has "
            f"{', '.join(data.BENCHMARKS)}"
        )
    notices: list[str] = []
    sets = {}
    for name in names:
        named = name in data.EVAL_SETS
        source = data.benchmark_source(name, config.data_dir or None) if named else name
        sets[name] = data.load_problems(source, log=notices.append)
    return Command(mode="evaluate", config=config, paths=against, sets=sets, notices=notices)
