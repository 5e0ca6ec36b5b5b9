"""Score a model on math benchmarks, with error bars, and say whether a difference is noise.

    python eval.py --model DIR|HUB_NAME --benchmarks aime24,amc,math500,minerva,olympiad_bench
    --data-dir DIR
    python eval.py --model M --samples 16 --temperature 0.6        avg@16; pass@k and maj@k for k = 1, 2, 4, 8, 16
    python eval.py --model M --templates qwen_math,r1,none         one model under several prompts: the paper's Table 1
    python eval.py --compare RUN paper                             a run next to the published rows (or with --model M)
    python eval.py --compare RUN_A RUN_B                           two runs, paired by problem
    python eval.py --regrade RUN/responses.jsonl --grader paper    grade again, without a model
    python eval.py --analyze RUN/responses.jsonl                   answering, exploration, self-reflection, lengths

The paper's protocol is the default: the Qwen-Math template, greedy, at most 3000 new tokens, one
answer per problem, and the plain mean of the five accuracies (paper, Table 4). Training evaluates
with the same code. Under torchrun every process answers its share. OUT/responses.jsonl grows as
batches finish; OUT/eval.json holds scores, every setting and versions. An interrupted evaluation
goes on when the same call is made again.
"""

import sys
from argparse import SUPPRESS
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import AutoTokenizer

from drgrpo import data, distributed
from drgrpo.config import Parser, check_name, flag
from drgrpo.engine import make_engine, resolve_engine, stop_token_ids
from drgrpo.evaluation import analyze, compare, regrade, report, responses
from drgrpo.evaluation.evaluate import answer, counters, judges
from drgrpo.model import max_positions
from drgrpo.rollout import tokenize
from drgrpo.run import provenance
from drgrpo.run.log import Log, Stopwatch
from drgrpo.templates import get_template
from drgrpo.types import Sampling, UserError

FREE = {
    "out",
    "data_dir",
    "sampler_batch",
    "kv_cache_gb",
    "write_every",
}  # an evaluation may go on with others of these


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    model: str = ""
    """Hugging Face folder or hub name; needed unless there is nothing to sample (--compare RUN ...,
    --regrade, --analyze)"""
    benchmarks: str = "aime24,amc,math500,minerva,olympiad_bench"
    """comma-separated: the five names, or any source that train.py --train-data takes"""
    data_dir: str = ""
    """folder with NAME.jsonl for each of the five; empty: the hub"""
    template: str = "qwen_math"
    """how a question becomes a prompt and where the answer is looked for: see
    drgrpo/templates.py"""
    templates: str = ""
    """several of them, comma-separated, one after the other, instead of --template"""
    engine: str = "auto"
    """sampler: vllm, or torch; auto is vllm on CUDA, torch elsewhere"""
    dtype: str = ""
    """float32 or bfloat16 (default: bfloat16 on CUDA, float32 elsewhere)"""
    temperature: float = 0.0
    """0 is greedy"""
    temperatures: str = ""
    """several of them, comma-separated, one after the other, instead of --temperature"""
    samples: int = 1
    """answers per problem: accuracy is their mean (avg@k), with pass@k and maj@k beside it"""
    max_new_tokens: int = 3000
    """generation budget; prompt and answer together also end at the model's positions"""
    seed: int = 0
    """of the samples"""
    sampler_batch: int = 256
    """sequences that a sampler runs at once, per process"""
    tp: int = 1
    """GPUs that one vLLM sampler spans (tensor parallel); each group of so many processes answers
    its share"""
    kv_cache_gb: float = 0.0
    """vLLM's key-value cache per process; 0: what 0.9 of the GPU leaves, or 0.25 without one"""
    write_every: int = 1024
    """responses per process between two writes of responses.jsonl: what an interruption can cost"""
    grader: str = "correct"
    """correct, or paper: the reference's grading, its slips on Minerva's trailing newlines
    included"""
    out: str = ""
    """folder for what is written (default: MODEL/eval, or runs/eval/NAME for a hub name)"""

    def __post_init__(self):
        check_name("--grader", self.grader, ("correct", "paper"))
        check_name("--dtype", self.dtype or "float32", ("float32", "bfloat16"))
        check_name("--engine", self.engine, ("auto", "torch", "vllm"))
        for name in ("samples", "max_new_tokens", "sampler_batch", "write_every", "tp"):
            if getattr(self, name) < 1:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be at least 1")
        for temperature in self.all_temperatures:
            if not 0 <= temperature < float("inf"):
                raise UserError(
                    f"temperature {temperature} must be 0, which is greedy, or a positive number"
                )
            if temperature == 0 and self.samples > 1:
                raise UserError(
                    f"--samples {self.samples} greedy answers would all be the same; add --temperature 1"
                )

    @property
    def all_templates(self) -> list[str]:
        return listed(self.templates) or [self.template]

    @property
    def all_temperatures(self) -> list[float]:
        try:
            return [float(t) for t in listed(self.temperatures)] or [self.temperature]
        except ValueError as error:
            raise UserError(
                f"--temperatures {self.temperatures} must be numbers with commas between, as 0.2,0.6,1"
            ) from error

    @property
    def folder(self) -> Path:
        default = (
            Path(self.model, "eval")
            if Path(self.model).is_dir()
            else Path("runs/eval", self.model.replace("/", "--"))
        )
        return Path(self.out) if self.out else default


def main(config: EvalConfig, against: str = "") -> None:
    # ---- check before anything expensive
    templates = [get_template(name) for name in config.all_templates]
    notices: list[str] = []
    sets = {
        name: data.load_problems(source(name, config.data_dir), say=notices.append)
        for name in listed(config.benchmarks)
    }
    if against not in ("", "paper"):
        responses.read(against)

    # ---- setup: processes, prompts, and what is answered already
    rank, world, device = distributed.start()
    if world % config.tp:
        raise UserError(f"--tp {config.tp} does not divide the {world} processes")
    transformers.utils.logging.disable_progress_bar()
    out = config.folder
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, active=rank == 0)
    for notice in notices:
        log.say(f"data: {notice}")
    engine_name = resolve_engine(config.engine, device)
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    tokenizer, positions = AutoTokenizer.from_pretrained(config.model), max_positions(config.model)
    prompts = {
        (t.name, name): tokenize(sets[name], t, tokenizer, positions - 1)[0]
        for t, name in product(templates, sets)
    }

    rows, about, answered = [], {}, [set()]
    if rank == 0:
        about = {
            "settings": asdict(config)
            | {
                "engine": engine_name,
                "dtype": dtype,
                "positions": positions,
                "weights": provenance.fingerprint(config.model),
                "data": {
                    name: provenance.problems_digest(problems) for name, problems in sets.items()
                },
            },
            "versions": provenance.versions(engine_name),
            "notices": notices,
        }
        rows, before = responses.claim(out, about, FREE)
        about |= {
            "device": f"{world} x {provenance.device_name(device)}",
            "counters": before.get("counters", {}),
            "seconds": before.get("seconds", 0.0),
        }
        responses.write_json(out / "eval.json", about)
        answered = [{responses.key(row) for row in rows}]
    dist.broadcast_object_list(answered)
    left = {
        (t, temperature, name): [
            p for p in sets[name] if (t.name, temperature, name, p.id) not in answered[0]
        ]
        for t, temperature, name in product(templates, config.all_temperatures, sets)
    }
    if answered[0]:
        log.say(
            f"{out}: {len(answered[0])} problems are answered, {sum(map(len, left.values()))} are left"
        )

    # ---- answer what is left, a chunk of a benchmark at a time
    engine = None
    if any(left.values()):
        longest = config.max_new_tokens + max(
            len(p.prompt_ids) for kept in prompts.values() for p in kept
        )
        engine = make_engine(
            engine_name,
            config.model,
            tokenizer,
            dtype=getattr(torch, dtype),
            device=device,
            batch=config.sampler_batch,
            max_tokens=min(positions, longest),
            kv_cache_gb=config.kv_cache_gb,
            tp=config.tp,
        )
        log.say(
            f"{config.model}: engine {engine.name}, {dtype}, answers of up to {config.max_new_tokens} tokens, "
            f"{positions} with the prompt"
        )
    watch, before, seconds = Stopwatch(), about.get("counters", {}), about.get("seconds", 0.0)
    size = max(1, config.write_every * world // config.tp // config.samples)
    with judges({t.answer for t in templates}, config.grader) as judge:
        for (template, temperature, name), problems in left.items():
            fitting = {p.id: p for p in prompts[template.name, name]}
            sampling = Sampling(
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                stop=template.stop,
                stop_token_ids=stop_token_ids(config.model, tokenizer),
            )
            tag = {"benchmark": name, "template": template.name, "temperature": temperature}
            for start in range(0, len(problems), size):
                chunk = [
                    fitting.get(p.id, p) for p in problems[start : start + size]
                ]  # what does not fit has no prompt_ids
                part = answer(
                    engine,
                    tokenizer,
                    judge[template.answer],
                    chunk,
                    config.samples,
                    sampling,
                    config.seed,
                    config.tp,
                )
                everyone = distributed.gather([counters(judge)], config.tp)
                if rank == 0:
                    rows += [tag | row for row in part]
                    log.record("responses", *rows[-len(part) :])
                    about["counters"] = {
                        k: before.get(k, 0) + sum(each[k] for each in everyone) for k in everyone[0]
                    }
                    about["seconds"] = seconds + watch.read()["total"]
                    responses.write_json(out / "eval.json", about)
            if problems:
                log.say(
                    f"{name}, {template.name}, T={temperature:g}: {len(problems)} problems answered"
                )

    # ---- report
    if rank == 0:
        report.write(log, about, rows)
        if against:
            compare.compare([against, str(out)], str(out))
    dist.barrier()
    if engine:
        engine.close()


# ---- command line


def listed(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def source(name: str, data_dir: str) -> str:
    return data.benchmark_source(name, data_dir or None) if name in data.BENCHMARKS else name


TAKES = {"regrade": {"grader", "out"}, "analyze": {"out"}, "compare": {"out"}}  # without --model


def dispatch(argv: list[str] | None) -> None:
    parser = Parser(EvalConfig, prog="eval.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        default=SUPPRESS,
        help="two folders, or one and `paper`",
    )
    parser.add_argument(
        "--regrade",
        metavar="FILE",
        default=SUPPRESS,
        help="grade responses.jsonl again, into another folder",
    )
    parser.add_argument(
        "--analyze",
        metavar="FILE",
        default=SUPPRESS,
        help="the base-model analyses of a responses.jsonl",
    )
    given = parser.parse(argv)
    named = [name for name in TAKES if name in given]
    wanted = {name: given.pop(name) for name in named}
    if given.get("model") and named in ([], ["compare"]):
        against = wanted.get("compare", [""])
        if len(against) > 1:
            raise UserError(
                f"--compare {' '.join(against)} with --model takes one name: its own run is the other"
            )
        return main(EvalConfig(**given), *against)
    if len(named) != 1:
        raise UserError(
            "name a --model to evaluate, or one of --compare RUN RUN, --regrade FILE and --analyze FILE"
        )
    if unused := given.keys() - TAKES[named[0]]:
        raise UserError(
            f"--{named[0]} samples nothing: leave out {', '.join(f'--{flag(name)}' for name in sorted(unused))}"
        )
    config = EvalConfig(**given)  # checks what is given
    match named[0]:
        case "compare":
            compare.compare(wanted["compare"], config.out)
        case "regrade":
            regrade.regrade(wanted["regrade"], config.grader, config.out)
        case "analyze":
            analyze.analyze(wanted["analyze"], config.out)


def cli(argv: list[str] | None = None) -> None:
    try:
        dispatch(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    cli()
