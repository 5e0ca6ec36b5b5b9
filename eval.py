"""Score a model on math benchmarks, with error bars, and say whether a difference is noise.

    python eval.py --model DIR|HUB_NAME --data-dir DIR             the paper's five benchmarks
    python eval.py --model M --samples 32 --temperature 0.6        mean@32, pass@k and maj@k
    python eval.py --model M --seeds 10 --temperature 0.6          mean and sd over 10 seeds
    python eval.py --model M --templates qwen_math,r1,none         the paper's Table 1
    python eval.py --compare RUN paper                             a run next to the published rows
    python eval.py --compare RUN_A RUN_B                           two runs, paired by problem
    python eval.py --model M --reward my.py:function               a reward beside the accuracy
    python eval.py --regrade RUN/responses.jsonl --grader paper    grade again, without a model
    python eval.py --analyze RUN/responses.jsonl                   answering, exploring, reflecting

The paper's protocol is the default: the Qwen-Math template, greedy, at most 3000 new tokens, one
answer per problem, and the plain mean of the five accuracies (paper, Table 4). Training evaluates
with the same code. Under torchrun every process answers its share.

OUT/responses.jsonl grows as batches finish. OUT/eval.json holds scores, settings and versions. The
same call continues an interrupted evaluation.
"""

from drgrpo.evaluation.config import Command, Dtype, parse_args
from drgrpo.run.cli import hard_exit, user_errors

if __name__ == "__main__":  # a mistake on the command line is answered before torch is imported
    with user_errors():
        command = parse_args()

from dataclasses import replace

import torch
import torch.distributed as dist

from drgrpo import distributed
from drgrpo.engine import make_engine, resolve_engine
from drgrpo.evaluation import analyze, compare, regrade, report
from drgrpo.evaluation.run import Record, answer_parts, make_parts, unanswered
from drgrpo.model import load_tokenizer, max_positions
from drgrpo.rollout import Sampler
from drgrpo.run.log import Log


def main(command: Command) -> None:
    """Evaluate a model."""
    config = command.config

    # 1. processes and log
    rank, _, device = distributed.start(config.tp)
    log = Log(config.folder, active=rank == 0)
    log.out.mkdir(parents=True, exist_ok=True)
    for notice in command.notices:
        log.say(f"data: {notice}")

    # 2. prompts: every benchmark under every template and temperature
    tokenizer, positions = load_tokenizer(config.model), max_positions(config.model)
    parts = make_parts(config, command.sets, tokenizer, positions)

    # 3. seed by seed, what an interrupted call has not answered already. The first seed that needs
    #    the engine starts it.
    dtype = resolve_dtype(config.dtype, device)
    engine_name = resolve_engine(config.engine, device)
    resolved = {"engine": engine_name, "dtype": dtype, "positions": positions}
    engine = None
    for call in command.by_seed():
        log = Log(call.config.folder, active=rank == 0)
        log.out.mkdir(parents=True, exist_ok=True)
        record = Record(log, call, resolved, device) if rank == 0 else None
        todo = unanswered(parts, record, log)
        if todo and not engine:
            longest = max(len(p.prompt_ids) for part in parts for p in part.problems)
            settings = replace(config, dtype=dtype)
            max_tokens = min(positions, longest + config.max_new_tokens)
            cache = config.kv_cache_gb
            engine = make_engine(settings, config.model, tokenizer, device, max_tokens, cache)
            log.say(
                f"{config.model}: engine {engine.name}, {dtype}, answers of up to "
                f"{config.max_new_tokens} tokens, {positions} with the prompt"
            )

        # 4. answer it, and write as answers arrive
        if engine and todo:
            sampler = Sampler(engine, tokenizer, call.config.seed, config.tp)
            answer_parts(config, todo, sampler, log, record)

        # 5. scores
        if record:
            report.write(log, record.report, record.rows)
            for run in command.paths:
                compare.compare([run, str(log.out)], str(log.out))
    if rank == 0 and config.seeds > 1:
        report.write_seeds(config.folder, [call.config.folder for call in command.by_seed()])
    dist.barrier()
    if engine:
        engine.close()


def resolve_dtype(name: Dtype, device: torch.device) -> Dtype:
    """What `auto` stands for on this machine."""
    return name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def cli(command: Command) -> None:
    """Do what the command line asks for."""
    config, paths = command.config, command.paths
    with hard_exit(), user_errors():
        match command.mode:
            case "evaluate":
                main(command)
            case "compare":
                compare.compare(paths, config.out)
            case "regrade":
                regrade.regrade(paths[0], config.grader, config.answer, config.out)
            case "analyze":
                analyze.analyze(paths[0], config.out)
        distributed.stop()


if __name__ == "__main__":
    cli(command)
