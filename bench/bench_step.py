"""What does each throughput feature buy? `python -m bench.bench_step` (a few minutes on two cores)

The training phase of one step (old log-probs, all optimizer steps) on the same rollouts, with everything on and with one
feature at a time off, for the tiny recipe's model and for a wider one. Variants take turns in one process; times are medians
of `--repeats` with their range. Results must agree before anything is timed: every variant has to give the same first
gradient norm. Writes bench/results/step.json; the last line printed is the JSON.
"""

import argparse
import json
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

import drgrpo.model
import train
from bench.harness import provenance
from drgrpo import data, distributed
from drgrpo.advantage import group_advantage
from drgrpo.config import RECIPES, Config
from drgrpo.engine import Sampling, TorchEngine
from drgrpo.grade import Grader
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss_ref
from drgrpo.model import Objective, load_policy
from drgrpo.rollout import rollout, tokenize
from drgrpo.templates import get_template
from drgrpo.tokenizer import byte_tokenizer
from drgrpo.warmup import Warmup, build_tiny_model, cached_tiny_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
WIDE = Warmup(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=768)

VARIANTS = {
    "everything on": {},
    "zero-advantage responses kept": {"drop_zero_advantage": False},
    "one response per micro-batch": {"tokens_per_microbatch": 1},
    "LM head not fused with the loss": {"unfused": True},
    "old log-probs recomputed": {"old_logprob": "recompute"},
    "activations recomputed, selective": {"checkpointing": "selective"},
    "activations recomputed, full": {"checkpointing": "full"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.start()
    config = replace(RECIPES["tiny"](), prompts_per_step=args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(WIDE, folder)
        models = {"tiny": str(cached_tiny_model(Warmup(), ROOT / "runs" / "warmup")), "wide": folder}
        report = {"where": provenance(), "repeats": args.repeats, "models": {}}
        for name, path in models.items():
            report["models"][name] = measure(config, path, args.repeats)
            print(table(name, report["models"][name]))
    distributed.stop()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def measure(config: Config, path: str, repeats: int) -> dict:
    rollouts, advantage_PG = sample(config, path)
    runs = {name: Variant(config, path, rollouts, advantage_PG, changes) for name, changes in VARIANTS.items()}
    norms = {name: run.step() for name, run in runs.items()}  # also warms up
    reference = norms["everything on"]
    assert all(abs(n - reference) < 1e-3 * reference for n in norms.values()), f"variants disagree: {norms}"
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run.step()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(r.length for r in rollouts)
    return {
        "parameters": runs["everything on"].policy.lm.num_parameters(),
        "rollouts": len(rollouts), "response_tokens": tokens,
        "zero_advantage": (advantage_PG == 0).float().mean().item(),
        "seconds": {name: {"median": median(s), "low": min(s), "high": max(s)} for name, s in seconds.items()},
    }  # fmt: skip


def sample(config: Config, path: str):
    """Rollouts of the model at `path` with their advantages; made-up ones where it gets nothing right."""
    tokenizer, template = byte_tokenizer(), get_template("arithmetic")
    problems, _ = tokenize(data.load_problems("arithmetic"), template, tokenizer, 64)
    engine = TorchEngine(path, tokenizer, dtype=torch.float32, device=CPU, batch=256, max_tokens=256)
    sampling = Sampling(max_new_tokens=config.max_new_tokens, stop_token_ids=(tokenizer.eos_token_id,))
    rollouts = rollout(engine, tokenizer, problems[: config.prompts_per_step], config.group_size, sampling, 0, 1)
    with Grader("hash") as grader:
        grades = grader([r.text for r in rollouts], [r.problem.answer for r in rollouts])
    reward_PG = torch.tensor([g.score for g in grades]).view(-1, config.group_size)
    if not reward_PG.any():  # random weights: half of the groups get one right answer in four
        reward_PG[::2, ::4] = 1.0
    return rollouts, group_advantage(reward_PG, "drgrpo")


class Variant:
    """The training phase of a step with some feature off, on a policy and an optimizer of its own."""

    def __init__(self, config: Config, path: str, rollouts, advantage_PG, changes: dict):
        self.unfused = changes.get("unfused", False)
        self.config = replace(config, **{k: v for k, v in changes.items() if k in asdict(config)})
        self.rollouts, self.advantage_PG = rollouts, advantage_PG
        self.policy = load_policy(path, dtype=torch.float32, device=CPU, checkpointing=self.config.checkpointing)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, fused=True)

    def step(self) -> float:
        """Pack, old log-probs, every optimizer step; the first gradient norm."""
        with unfused_head() if self.unfused else nothing():
            updates = train.plan_updates(self.config, self.rollouts, self.advantage_PG, 1, 0, 1, CPU)
            old = [[train.old_logprob(self.config, self.policy, b, Objective()) for b in batches] for batches in updates]
            norms = [
                train.train_minibatch(self.config, self.policy, self.optimizer, [*zip(b, o, [None] * len(b), strict=True)],
                                      Objective(), lr=0.0, check_parity=False)["grad_norm"]
                for b, o in zip(updates, old, strict=True)
            ]  # fmt: skip
        return norms[0]


@contextmanager
def nothing():
    yield


@contextmanager
def unfused_head():
    """The reference implementation in the fused one's place: whole logits, autograd."""
    fused = drgrpo.model.linear_drgrpo_loss
    drgrpo.model.linear_drgrpo_loss = linear_drgrpo_loss_ref
    yield
    drgrpo.model.linear_drgrpo_loss = fused


def table(name: str, result: dict) -> str:
    base = result["seconds"]["everything on"]["median"]
    lines = [f"{name}: {result['parameters']:,} parameters, {result['response_tokens']:,} response tokens, "
             f"{result['zero_advantage']:.0%} without advantage", "| feature | seconds (low-high) | times |", "|---|---|---|"]
    for variant, s in result["seconds"].items():
        lines.append(f"| {variant} | {s['median']:.3f} ({s['low']:.3f}-{s['high']:.3f}) | {s['median'] / base:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
