"""Score a model on math benchmarks: `python eval.py --model DIR|HUB_NAME [--benchmarks aime24,amc,...]`

The paper's protocol is the default: the Qwen-Math template, greedy, at most 3000 new tokens, one answer per problem, and the
plain mean of the five accuracies (paper, Table 4). Training evaluates with the same code. Under torchrun every process
answers its share. Writes OUT/eval.json (scores and every setting) and OUT/responses.jsonl.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import transformers
from rich.table import Table
from transformers import AutoTokenizer

from drgrpo import data, distributed
from drgrpo.config import Parser, check_name
from drgrpo.engine import Sampling, make_engine, resolve_engine, stop_token_ids
from drgrpo.evaluate import Scored, evaluate, summarize
from drgrpo.grade import Grader
from drgrpo.log import Log, number
from drgrpo.model import max_positions
from drgrpo.rollout import tokenize
from drgrpo.templates import get_template
from drgrpo.types import UserError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    model: str
    """Hugging Face folder or hub name"""
    benchmarks: str = "aime24,amc,math500,minerva,olympiad_bench"
    """comma-separated: the five names, or any source that train.py --train-data takes"""
    data_dir: str = ""
    """folder with NAME.jsonl for each of the five; empty: the hub"""
    template: str = "qwen_math"
    """how a question becomes a prompt and where the answer is looked for: see drgrpo/templates.py"""
    engine: str = "auto"
    """sampler: vllm, or torch; auto is vllm on CUDA, torch elsewhere"""
    dtype: str = ""
    """float32 or bfloat16 (default: bfloat16 on CUDA, float32 elsewhere)"""
    temperature: float = 0.0
    """0 is greedy"""
    samples: int = 1
    """answers per problem: accuracy is their mean (avg@k)"""
    max_new_tokens: int = 3000
    """generation budget; prompt and answer together also end at the model's positions"""
    seed: int = 0
    """of the samples"""
    sampler_batch: int = 256
    """sequences that a sampler runs at once, per process"""
    kv_cache_gb: float = 0.0
    """vLLM's key-value cache per process; 0: a third of the GPU, or 0.25 without one"""
    grader: str = "correct"
    """correct, or paper: the reference's grading, its slips on Minerva's trailing newlines included"""
    out: str = ""
    """folder for eval.json and responses.jsonl (default: MODEL/eval, or runs/eval for a hub name)"""

    def __post_init__(self):
        check_name("--grader", self.grader, ("correct", "paper"))
        check_name("--dtype", self.dtype or "float32", ("float32", "bfloat16"))
        if self.temperature == 0 and self.samples > 1:
            raise UserError(f"--samples {self.samples} greedy answers would all be the same; add --temperature 1")


def main(config: EvalConfig) -> None:
    # ---- check before anything expensive
    template = get_template(config.template)
    names = [name.strip() for name in config.benchmarks.split(",") if name.strip()]
    sets = {name: data.load_problems(source(name, config.data_dir)) for name in names}

    # ---- setup
    rank, _, device = distributed.start()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    out = Path(config.out or (Path(config.model) / "eval" if Path(config.model).is_dir() else "runs/eval"))
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, active=rank == 0)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    positions = max_positions(config.model)
    engine = make_engine(resolve_engine(config.engine, device), config.model, tokenizer, dtype=dtype, device=device,
                         batch=config.sampler_batch, max_tokens=positions, kv_cache_gb=config.kv_cache_gb)  # fmt: skip
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, stop=template.stop,
                        stop_token_ids=stop_token_ids(config.model, tokenizer))  # fmt: skip
    log.say(f"{config.model}: engine {engine.name}, {dtype}, template {config.template}, temperature {config.temperature:g}, "
            f"answers of up to {config.max_new_tokens} tokens, {positions} with the prompt")  # fmt: skip

    # ---- one pass per benchmark
    results, responses = {}, []
    with Grader(template.answer, mode=config.grader) as grader:
        for name, problems in sets.items():
            kept, dropped = tokenize(problems, template, tokenizer, positions - 1)
            scored = evaluate(engine, tokenizer, grader, kept, config.samples, sampling, config.seed)
            results[name] = summarize(scored, dropped)
            responses += [response_row(name, s) for s in scored]
            log.say(f"{name}: {results[name]['accuracy']:.1%} of {results[name]['n']}, {dropped} prompts too long (wrong)")

    # ---- report
    average = fmean(r["accuracy"] for r in results.values())
    log.console.print(table(config, results, average))
    if rank == 0:
        report = {"average": average, "benchmarks": results, "settings": asdict(config) | {"positions": positions},
                  "engine": engine.name, "dtype": str(dtype), "versions": versions(engine.name)}  # fmt: skip
        (out / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in responses))
        log.say(f"wrote {out}/eval.json and {out}/responses.jsonl")
    dist.barrier()
    engine.close()


def source(name: str, data_dir: str) -> str:
    return data.benchmark_source(name, data_dir or None) if name in data.BENCHMARKS else name


def response_row(benchmark: str, scored: Scored) -> dict:
    r = scored.rollout
    return {"benchmark": benchmark, "id": r.problem.id, "problem": r.problem.question, "answer": r.problem.answer,
            "response": r.text, "score": scored.grade.score, "parsed": scored.grade.parsed, "tokens": r.length,
            "finished": r.completion.finished}  # fmt: skip


def table(config: EvalConfig, results: dict[str, dict], average: float) -> Table:
    how = "greedy" if config.temperature == 0 else f"mean of {config.samples} at T={config.temperature:g}"
    table = Table(title=f"{config.model}, {config.template}, {how}, grader {config.grader}", title_justify="left")
    for column in ("benchmark", "accuracy %", "± s.e.", "n", "len right", "len wrong", "cut %", "no answer %"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for name, r in results.items():
        error = math.sqrt(r["accuracy"] * (1 - r["accuracy"]) / r["n"])
        table.add_row(name, f"{100 * r['accuracy']:.1f}", f"{100 * error:.1f}", str(r["n"]), number(r["len_correct"]),
                      number(r["len_incorrect"]), percent(r["truncated_frac"]), percent(r["unparsed_frac"]))  # fmt: skip
    table.add_section()
    table.add_row("average", f"{100 * average:.1f}", "", str(sum(r["n"] for r in results.values())))
    return table


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def versions(engine: str) -> dict[str, str]:
    """Of what the scores depend on."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "math-verify": version("math-verify")}
    if engine == "vllm":
        import vllm

        found["vllm"] = vllm.__version__
    return found


def cli(argv: list[str] | None = None) -> None:
    try:
        main(EvalConfig(**Parser(EvalConfig, prog="eval.py", description="Score a model on math benchmarks.").parse(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    cli()
