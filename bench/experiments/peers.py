"""How fast is this trainer next to TRL's `GRPOTrainer` on the same task, and do the losses of TRL
and Liger agree with ours?

    pip install --group peers                   TRL and Liger, into the same environment: torch and transformers stay
    python -m bench.experiments.peers                 everything below, in less than ten minutes on two cores
    python -m bench.experiments.peers --parts loss    some of it: speed, options, loss

**speed**: both train the warmed-up model of the tiny recipe on the CPU, in processes of their own
that take turns: the same prompts in the same order, group size, token budget, grader, optimizer,
learning rate and number of threads; one optimizer step a rollout, and four. Seconds by phase,
tokens/s, peak memory, the positions that each one runs through the model (padding and rows that
have ended are positions too: most of the difference), the reward against wall time, and the
held-out accuracy of both by one evaluator. A turn is a seed. Not timed: the first step, which also
allocates, and the last, in which ours also saves.

TRL is set up as somebody would who knows it: no reference model, no checkpointing, fused AdamW, no
logging, all 256 responses sampled at once. **options** times TRL alone with each of `TRL_OPTIONS`,
in turns; **speed** takes the fastest.

**loss**: on identical hidden states, weight, targets, advantages and old log-probs, loss and both
gradients of ours, TRL's `GRPOTrainer.compute_loss` and Liger's `LigerFusedLinearGRPOLoss` against
the formula in float64; and TRL's advantages.

Writes OUT.json and, with **speed**, OUT.png; prints Markdown; the last line of stdout is the JSON.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers

import train
from bench.experiments.peer_losses import (
    WHY,
    advantage_table,
    loss_table,
    measure_advantages,
    measure_loss,
)
from bench.harness import ROOT, installed, markdown, provenance, write_json
from drgrpo import data, distributed
from drgrpo.config import RECIPES, Config
from drgrpo.engine_torch import TorchEngine
from drgrpo.evaluation.evaluate import evaluate, summarize
from drgrpo.grade import Grader
from drgrpo.model import Policy
from drgrpo.rollout import tokenize
from drgrpo.templates import get_template
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, cached_tiny_model
from drgrpo.types import Sampling

PEERS = {
    "trl": "trl",
    "accelerate": "accelerate",
    "liger_kernel": "liger-kernel",
}  # module: distribution
TRAINERS = ("TRL", "ours")
PHASES = ("rollout", "grade", "pack", "old", "train", "sync", "rest")
TRL_OPTIONS = {
    "dynamic cache, micro-batches of 64": {"per_device_train_batch_size": 64},
    "static cache": {"per_device_train_batch_size": 64, "cache_implementation": "static"},
    "micro-batches of 256": {"per_device_train_batch_size": 256},
}
"""What TRL may be run with; without **options** the first. Left out: `torch_compile` (every length
compiles anew) and continuous batching, which were many times slower on a CPU."""


def require_peers(parts: list[str]) -> None:
    """One line and status 2 if a package that these parts need is missing."""
    needed = list(PEERS) if "loss" in parts else ["trl", "accelerate"]
    if missing := [PEERS[module] for module in needed if importlib.util.find_spec(module) is None]:
        print(
            f"error: bench.experiments.peers compares with {', '.join(missing)}, not installed here: pip install --group peers "
            "(pip 25.1 or newer, in the repository's root)",
            file=sys.stderr,
        )
        sys.exit(2)


# ---- speed: one training run in a process of its own


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a child process is told; `options` are TRL's."""

    trainer: str
    model: str
    folder: str
    seed: int
    steps: int
    minibatches: int
    threads: int
    options: dict


def config_of(run: Run) -> Config:
    """The tiny recipe without what TRL does not do in its loop: evaluation, checkpoints; and with a
    constant learning rate, as the two warm-ups differ by one step."""
    return replace(
        RECIPES["tiny"](),
        model=run.model,
        out=f"{run.folder}/run",
        seed=run.seed,
        steps=run.steps,
        minibatches=run.minibatches,
        warmup_steps=0,
        eval_data="",
        save_every=0,
    )


class Meter:
    """Of every step of a trainer that it watches: seconds by phase, CPU seconds of the process,
    positions by phase, facts."""

    def __init__(self):
        self.rows, self.seconds, self.positions, self.facts = [], Counter(), Counter(), {}

    def start(self) -> None:
        self.last, self.last_cpu = time.perf_counter(), time.process_time()
        self.resident = status_gb("VmRSS")

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def step(self) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        total = now - self.last
        self.seconds["rest"] = total - sum(self.seconds.values())
        self.rows.append(
            {
                **self.facts,
                "total": total,
                "cpu": cpu - self.last_cpu,
                "seconds": dict(self.seconds),
                "positions": dict(self.positions),
            }
        )
        self.last, self.last_cpu = now, cpu
        self.seconds.clear()
        self.positions.clear()

    def result(self) -> dict:
        return {"rows": self.rows, "peak_gb": status_gb("VmHWM"), "before_gb": self.resident}


def status_gb(field: str) -> float:
    """VmRSS or VmHWM of this process in GB. Not `ru_maxrss`: after a vfork that includes the
    parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return (
        next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024 / 2**30
    )


def child(run: Run) -> None:
    """Trains, leaves `result.json` and a Hugging Face folder `hf` in `run.folder`."""
    torch.set_num_threads(run.threads)
    meter = Meter()
    hf = {"ours": train_ours, "TRL": train_trl}[run.trainer](run, meter)
    (Path(run.folder) / "result.json").write_text(json.dumps({**meter.result(), "hf": str(hf)}))


def train_ours(run: Run, meter: Meter) -> Path:
    """train.py as it is; its own stopwatch gives the phases."""

    def before_step(original, problems, step, *args):
        if step == 1:
            meter.start()
        return original(problems, step, *args)

    def sampled(original, engine, token_BL, *args):
        meter.positions["rollout"] += token_BL.numel()
        return original(engine, token_BL, *args)

    def passed(original, policy, batch, objective, *args):
        meter.positions["train" if args else "old"] += len(batch.token_T)
        return original(policy, batch, objective, *args)

    def logged(original, log, row, *args):
        meter.seconds.update(
            {phase: row["seconds"].get(phase, 0.0) for phase in PHASES if phase != "rest"}
        )
        meter.facts = {"reward": row["reward_mean"], "tokens": row["tokens"]}
        result = original(log, row, *args)
        meter.step()
        return result

    with ExitStack() as stack:
        for owner, name, spy in (
            (train.data, "step_problems", before_step),
            (TorchEngine, "_forward", sampled),
            (Policy, "forward", passed),
            (train.Log, "step", logged),
        ):
            stack.enter_context(mock.patch.object(owner, name, spying(getattr(owner, name), spy)))
        train.main(config_of(run))
    return Path(run.folder) / "run" / "hf"


def spying(original: Callable, spy: Callable) -> Callable:
    """A function in `original`'s place that calls `spy(original, *its arguments)`."""
    return lambda *args, **kwargs: spy(original, *args, **kwargs)


def train_trl(run: Run, meter: Meter) -> Path:
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Watch(TrainerCallback):
        """An optimizer step lasts from `on_step_begin` to `on_step_end`; sampling happens inside
        the first one."""

        def on_train_begin(self, *args, **kwargs):
            meter.start()

        def on_step_begin(self, *args, **kwargs):
            self.begun, self.before = time.perf_counter(), meter.seconds.total()

        def on_step_end(self, args, state, *_, **kwargs):
            inside = meter.seconds.total() - self.before
            meter.seconds["train"] += time.perf_counter() - self.begun - inside
            if state.global_step % run.minibatches == 0:
                meter.step()

    class Metered(GRPOTrainer):
        def _prepare_inputs(self, *args):
            before, start = meter.seconds.total(), time.perf_counter()
            inputs = super()._prepare_inputs(*args)
            meter.seconds["pack"] += time.perf_counter() - start - (meter.seconds.total() - before)
            return inputs

        def _generate(self, *args):
            with meter.phase("rollout"):
                sampled = super()._generate(*args)
            lengths = [len(ids) for ids in sampled[1]]
            meter.facts["tokens"] = sum(lengths)
            meter.positions["rollout"] += sum(map(len, sampled[0])) + len(lengths) * (
                max(lengths) - 1
            )
            return sampled

        def _calculate_rewards(self, *args):
            with meter.phase("grade"):
                rewards = super()._calculate_rewards(*args)
            meter.facts["reward"] = rewards.mean().item()
            return rewards

        def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
            training = torch.is_grad_enabled()
            meter.positions["train" if training else "old"] += input_ids.numel()
            if training:  # part of the optimizer step
                return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
            with meter.phase("old"):
                return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    tokenizer, config = byte_tokenizer(), config_of(run)
    with Grader("hash") as grader:

        def reward(completions, completion_ids, answer, **_):
            """Ours: 0 or 1, and 0 where the response was cut off."""
            ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
            return [
                grade.score * end
                for grade, end in zip(grader(completions, answer), ended, strict=True)
            ]

        trainer = Metered(
            model=run.model,
            reward_funcs=reward,
            args=GRPOConfig(**trl_arguments(config, run.options)),
            train_dataset=prompts_in_order(config),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
    trainer.save_model(f"{run.folder}/hf")
    return Path(run.folder) / "hf"


def trl_arguments(config: Config, options: dict) -> dict:
    """TRL's names for the values of `config`, then what it takes to be quick on a CPU."""
    rollouts, micro = (
        config.rollouts_per_step,
        min(options["per_device_train_batch_size"], config.minibatch_size),
    )
    return {
        "output_dir": f"{config.out}-trl",
        "seed": config.seed,
        "max_steps": config.steps * config.minibatches,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",  # the loss type alone leaves the division by the std in place
        "num_generations": config.group_size,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "beta": config.kl_coef,
        "epsilon": config.clip_low,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.minibatch_size // micro,
        "steps_per_generation": rollouts // micro,
        "shuffle_dataset": False,
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch_fused",
        "model_init_kwargs": {"dtype": config.dtype, "attn_implementation": "sdpa"},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "cache_implementation": options.get("cache_implementation"),
    }


def prompts_in_order(config: Config):
    """The prompts of every step as our trainer would take them; TRL repeats each one for its
    group."""
    from datasets import Dataset

    problems, template = data.load_problems(config.train_data), get_template(config.template)
    chosen = [
        p
        for step in range(1, config.steps + 1)
        for p in data.step_problems(problems, step, config.prompts_per_step, config.seed)
    ]
    return Dataset.from_dict(
        {
            "prompt": [template.text.replace("{q}", p.question) for p in chosen],
            "answer": [p.answer for p in chosen],
        }
    )


# ---- speed: turns and what comes of them


def launch(run: Run) -> dict:
    """The child's `result.json`. What it prints is shown if it fails."""
    Path(run.folder).mkdir(parents=True)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(run.threads),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "bench.experiments.peers", "--child", json.dumps(vars(run))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{run.trainer} failed with status {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return json.loads((Path(run.folder) / "result.json").read_text())


def measure_speed(args, model: str, folder: Path, chosen: dict[str, str]) -> dict:
    """minibatches -> trainer -> summary of its turns; TRL with the option `chosen` for them."""
    speed = {}
    for minibatches in args.minibatches:
        turns, options = {name: [] for name in TRAINERS}, TRL_OPTIONS[chosen[str(minibatches)]]
        for turn in range(args.turns):
            for name in TRAINERS:
                run = Run(
                    trainer=name,
                    model=model,
                    folder=f"{folder}/{minibatches}-{turn}-{name}",
                    seed=turn,
                    steps=args.steps,
                    minibatches=minibatches,
                    threads=args.threads,
                    options=options,
                )
                result = launch(run)
                turns[name].append({**result, "accuracy": held_out(result["hf"], config_of(run))})
                print(
                    f"# {minibatches} optimizer steps, turn {turn}, {name}: {mean_step(result):.3f} s/step",
                    file=sys.stderr,
                )
        speed[str(minibatches)] = {name: summary(results) for name, results in turns.items()}
    return speed


def measure_options(args, model: str, folder: Path) -> dict:
    """minibatches -> alternative -> CPU seconds a step in every turn. Micro-batches above an
    optimizer step are left out."""
    found = {}
    for minibatches in args.minibatches:
        size = RECIPES["tiny"]().rollouts_per_step // minibatches
        possible = {
            k: o for k, o in TRL_OPTIONS.items() if o["per_device_train_batch_size"] <= size
        }
        found[str(minibatches)] = {name: [] for name in possible}
        for turn in range(2):
            for name, options in possible.items():
                run = Run(
                    trainer="TRL",
                    model=model,
                    folder=f"{folder}/options-{minibatches}-{turn}-{name}",
                    seed=turn,
                    steps=5,
                    minibatches=minibatches,
                    threads=args.threads,
                    options=options,
                )
                found[str(minibatches)][name].append(mean_step(launch(run), "cpu"))
    return found


def fastest(options: dict[str, list[float]]) -> str:
    """The option with the lowest mean; the first one if none was options."""
    return (
        min(options, key=lambda name: fmean(options[name])) if options else next(iter(TRL_OPTIONS))
    )


def held_out(hf: str, config: Config) -> dict[str, float]:
    """Accuracy on the held-out problems, greedy and sampled, with the repository's evaluator."""
    tokenizer, template = byte_tokenizer(), get_template(config.template)
    engine = TorchEngine(
        hf, tokenizer, dtype=torch.float32, device=torch.device("cpu"), batch=256, max_tokens=256
    )
    problems, _ = tokenize(data.load_problems("arithmetic_heldout"), template, tokenizer, 64)
    accuracy = {}
    with Grader(template.answer) as grader:
        for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", 3, 1.0)):
            sampling = Sampling(
                max_new_tokens=config.max_new_tokens,
                stop_token_ids=(tokenizer.eos_token_id,),
                temperature=temperature,
            )
            scored = evaluate(engine, tokenizer, grader, problems, samples, sampling, seed=0)
            accuracy[name] = summarize(scored)["accuracy"]
    return accuracy


def timed(result: dict) -> list[dict]:
    """The steps that count: without the first, which also allocates, and the last, in which ours
    also saves."""
    return result["rows"][1:-1]


def mean_step(result: dict, clock: str = "total") -> float:
    """Seconds a step of `timed`; `clock` "cpu": CPU seconds, which other work on the machine hardly
    changes."""
    return fmean(row[clock] for row in timed(result))


def summary(results: list[dict]) -> dict:
    """Of the turns of one trainer: medians over turns of means over steps, with the lowest and
    highest turn."""

    def over_turns(value: Callable[[dict], float]) -> float:
        return median(fmean(map(value, timed(result))) for result in results)

    return {
        "seconds": {
            phase: over_turns(lambda row, p=phase: row["seconds"].get(p, 0.0)) for phase in PHASES
        },
        "steps": [mean_step(result) for result in results],
        "cpu_steps": [mean_step(result, "cpu") for result in results],
        "tokens_per_s": over_turns(lambda row: row["tokens"])
        / median(mean_step(result) for result in results),
        "tokens": over_turns(lambda row: row["tokens"]),
        "positions": {
            p: over_turns(lambda row, p=p: row["positions"].get(p, 0))
            for p in ("rollout", "old", "train")
        },
        "peak_gb": max(result["peak_gb"] for result in results),
        "before_gb": max(result["before_gb"] for result in results),
        "late_reward": [fmean(row["reward"] for row in result["rows"][-10:]) for result in results],
        "accuracy": {
            way: [result["accuracy"][way] for result in results] for way in ("greedy", "sampled")
        },
        "curves": [
            {
                "seconds": list(accumulate(row["total"] for row in result["rows"])),
                "reward": [row["reward"] for row in result["rows"]],
            }
            for result in results
        ],
    }


def speed_table(minibatches: str, trainers: dict) -> str:
    """Markdown, TRL against ours, a line a phase. The last column: by what factor ours is better
    (or has less to do)."""
    trl, ours = (trainers[name] for name in TRAINERS)

    def line(title, pick, form, more_is_better=False):
        a, b = pick(trl), pick(ours)
        factor = b / max(a, 1e-9) if more_is_better else a / max(b, 1e-9)
        return f"| {title} | {a:{form}} | {b:{form}} | {f'{factor:.1f}' if min(a, b) >= 5e-4 else '–'} |"

    def turns(title, pick):
        return f"| {title} | {spread(pick(trl))} | {spread(pick(ours))} | |"

    factor, cpu_factor = (median(trl[key]) / median(ours[key]) for key in ("steps", "cpu_steps"))
    return "\n".join(
        [
            f"| {minibatches} optimizer step{'s' * (minibatches != '1')} a rollout | TRL | ours | factor |",
            "|---|---|---|---|",
            f"| **s/step**, median (range) | {spread(trl['steps'], median)} | {spread(ours['steps'], median)} | **{factor:.1f}** |",
            f"| CPU-s/step | {spread(trl['cpu_steps'], median)} | {spread(ours['cpu_steps'], median)} | {cpu_factor:.1f} |",
            *(
                line(f"{phase}, s", lambda side, p=phase: side["seconds"][p], ".3f")
                for phase in PHASES
            ),
            *(
                line(f"positions, {p}", lambda side, p=p: side["positions"][p], ",.0f")
                for p in ("rollout", "old", "train")
            ),
            *(
                line(
                    f"µs a position, {p}",
                    lambda side, p=p: 1e6 * side["seconds"][p] / side["positions"][p],
                    ".1f",
                )
                for p in ("rollout", "train")
            ),
            line("sampled tokens a step", lambda side: side["tokens"], ",.0f"),
            line("sampled tokens/s", lambda side: side["tokens_per_s"], ",.0f", True),
            line("peak memory, GB", lambda side: side["peak_gb"], ".2f"),
            line("resident before step 1, GB", lambda side: side["before_gb"], ".2f"),
            turns("reward, last 10 steps", lambda side: side["late_reward"]),
            *(
                turns(f"held-out accuracy, {way}", lambda side, w=way: side["accuracy"][w])
                for way in ("sampled", "greedy")
            ),
        ]
    )


def spread(values: list[float], middle: Callable = fmean) -> str:
    """The mean or median, and the range."""
    return f"{middle(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def options_table(found: dict) -> str:
    """Markdown: a line an alternative, a column a number of optimizer steps."""
    heads = [
        "TRL, CPU-s/step, mean (range)",
        *(f"{minibatches} a rollout" for minibatches in found),
    ]
    rows = [
        [name, *(spread(by[name]) if name in by else "–" for by in found.values())]
        for name in TRL_OPTIONS
    ]
    return markdown(heads, rows)


def draw(speed: dict, path: Path) -> None:
    """Left: seconds a step, stacked by phase. Then, for each number of optimizer steps, reward
    against wall time."""
    figure, axes = plt.subplots(
        1, 1 + len(speed), figsize=(4.4 * (1 + len(speed)), 3.6), constrained_layout=True
    )
    bars = {
        f"{name}, {m}": side["seconds"]
        for m, trainers in speed.items()
        for name, side in trainers.items()
    }
    bottom = [0.0] * len(bars)
    for phase in PHASES:
        heights = [seconds[phase] for seconds in bars.values()]
        axes[0].bar(list(bars), heights, bottom=bottom, label=phase)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes[0].set(title="seconds per step", xlabel="trainer, optimizer steps per rollout", ylabel="s")
    axes[0].legend(fontsize=7)
    for axis, (minibatches, trainers) in zip(axes[1:], speed.items(), strict=True):
        for i, (name, side) in enumerate(trainers.items()):
            for turn, curve in enumerate(side["curves"]):
                axis.plot(
                    curve["seconds"],
                    smooth(curve["reward"]),
                    color=f"C{i}",
                    lw=1.2,
                    label=None if turn else name,
                )
        axis.set(
            title=f"sampled reward, {minibatches} per rollout", xlabel="wall time, s", ylim=(0, 1)
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last `width` values, of fewer at the start."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


# ---- command line

PARTS = ("speed", "options", "loss")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=30, help="rollouts of a run, 3 or more (30)")
    parser.add_argument(
        "--turns", type=int, default=3, help="runs of each trainer, with the seeds 0, 1, ... (3)"
    )
    parser.add_argument(
        "--minibatches", type=int, nargs="+", default=[4, 1], help="optimizer steps a rollout (4 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of either trainer (1)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "peers", help="without suffix"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(Run(**json.loads(args.child)))
    if args.steps < 3:
        parser.error(
            f"--steps {args.steps}: the first and the last step are not timed, so it takes 3 or more"
        )
    require_peers(args.parts)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    distributed.start()
    model = str(
        cached_tiny_model(
            Warmup(), ROOT / "runs" / "warmup", lambda text: print(f"# {text}", file=sys.stderr)
        )
    )
    report = {
        "where": provenance() | {name: installed(name) for name in PEERS},
        "threads": args.threads,
        "steps": args.steps,
        "turns": args.turns,
    }
    with tempfile.TemporaryDirectory() as folder:
        if "loss" in args.parts:
            report["loss"], report["advantage"] = (
                measure_loss(model, Path(folder)),
                measure_advantages(model, Path(folder)),
            )
            print(
                loss_table(report["loss"]),
                advantage_table(report["advantage"]),
                WHY,
                sep="\n\n",
                end="\n\n",
                flush=True,
            )
        if "options" in args.parts:
            report["options"] = measure_options(args, model, Path(folder))
            print(options_table(report["options"]), end="\n\n", flush=True)
        if "speed" in args.parts:
            options = report.get("options", {})
            report["trl_runs_with"] = {
                str(m): fastest(options.get(str(m), {})) for m in args.minibatches
            }
            report["speed"] = measure_speed(args, model, Path(folder), report["trl_runs_with"])
            print(f"TRL runs with: {report['trl_runs_with']}", end="\n\n")
            print(*(speed_table(*item) for item in report["speed"].items()), sep="\n\n", end="\n\n")
    distributed.stop()
    print(write_json(args.out.with_suffix(".json"), report))
    if "speed" in report:
        draw(report["speed"], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
