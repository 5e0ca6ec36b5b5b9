"""How fast is this trainer next to TRL's `GRPOTrainer` on the same task, and do the losses agree?

    pip install --group peers                   TRL and Liger beside torch and transformers
    python -m bench.experiments.peers           less than ten minutes on two cores

Result: a step with four optimizer steps takes 0.24 s here and 1.22 s with TRL 1.16, a factor of
5.0. With one optimizer step the factor is 3.1, and both losses of Dr. GRPO agree to float32.

bench/results/peers.json and peers.png come from commit 86a7abd, on two cores of an AMD EPYC, with
TRL 1.16.0 and Liger 0.8.5. The last line printed is the JSON.

**Speed.** Both train the warmed-up model of the tiny recipe on the CPU, each run in a process of
its own, in turns. A turn is a seed. Prompts and their order, group size, token budget, grader,
optimizer, learning rate and threads are the same. Positions count what a trainer runs through the
model, padding and rows that have ended included. Most of the difference lies there. The first step
is not timed, because it also allocates. The last one is not timed, because ours also saves in it.

TRL is set up as an expert would: no reference model, no checkpointing, fused AdamW, no logging, all
256 responses sampled at once, and micro-batches of a whole optimizer step. These were the fastest
of the options that commit 4de8ddc timed. A static cache, `torch_compile` and continuous batching
were slower.

**Loss.** `bench.experiments.peer_losses` compares the losses on identical inputs.
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
from functools import partial
from itertools import accumulate, product
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from unittest import mock

import torch
import transformers

import train
from bench import harness
from bench.experiments import peer_losses
from bench.harness import RESULTS, ROOT, markdown, spread
from drgrpo import data, distributed
from drgrpo.config import RECIPES, Config
from drgrpo.engine_torch import TorchEngine
from drgrpo.evaluation.evaluate import evaluate, summarize
from drgrpo.grade import Grader
from drgrpo.model import Policy
from drgrpo.rollout import Sampler, tokenize
from drgrpo.run.provenance import installed
from drgrpo.templates import get_template
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, cached_tiny_model
from drgrpo.types import Sampling

PEERS = {"trl": "trl", "liger_kernel": "liger-kernel"}
"""Modules, and the distributions that they come from."""
TRAINERS = ("TRL", "ours")
PHASES = ("rollout", "grade", "pack", "old", "train", "sync", "rest")
PASSES = ("rollout", "old", "train")  # phases that run positions through the model


def require_peers() -> None:
    """One line and status 2 if a package is missing."""
    absent = [PEERS[module] for module in PEERS if importlib.util.find_spec(module) is None]
    if absent:
        way_out = "pip install --group peers (pip 25.1 or newer, in the repository's root)"
        message = f"bench.experiments.peers compares with {', '.join(absent)}, not installed here"
        print(f"error: {message}: {way_out}", file=sys.stderr)
        sys.exit(2)


# ---- one training run in a process of its own


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a child process is told."""

    trainer: str
    model: str
    folder: str
    seed: int
    steps: int
    minibatches: int


def config_of(run: Run) -> Config:
    """The tiny recipe without what TRL does not do in its loop: evaluation and checkpoints. The
    learning rate is constant, as the two warm-ups differ by one step."""
    told = {key: getattr(run, key) for key in ("model", "seed", "steps", "minibatches")}
    absent = dict(warmup_steps=0, eval_data="", save_every=0)
    return replace(RECIPES["tiny"](), out=f"{run.folder}/run", **told, **absent)


class Meter:
    """Of every step: seconds by phase, CPU seconds of the process, positions by phase, facts."""

    def __init__(self):
        self.rows, self.seconds, self.positions, self.facts = [], Counter(), Counter(), {}

    def start(self) -> None:
        self.last, self.last_cpu = time.perf_counter(), time.process_time()
        self.resident = status_gb("VmRSS")

    @contextmanager
    def phase(self, name: str):
        """Adds the time inside to a phase, without what inner phases took."""
        start, before = time.perf_counter(), self.seconds.total()
        yield
        inner = self.seconds.total() - before
        self.seconds[name] += time.perf_counter() - start - inner

    def step(self) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        total = now - self.last
        self.seconds["rest"] = total - self.seconds.total()
        row = {"total": total, "cpu": cpu - self.last_cpu}
        phases = {"seconds": dict(self.seconds), "positions": dict(self.positions)}
        self.rows.append(self.facts | row | phases)
        self.last, self.last_cpu = now, cpu
        self.seconds.clear()
        self.positions.clear()

    def result(self) -> dict:
        return {"rows": self.rows, "peak_gb": status_gb("VmHWM"), "before_gb": self.resident}


def status_gb(field: str) -> float:
    """VmRSS or VmHWM of this process in GB. `ru_maxrss` includes the parent's after a vfork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 2**30


def child(run: Run) -> None:
    """Trains, leaves `result.json` and a Hugging Face folder `hf` in `run.folder`."""
    torch.set_num_threads(1)
    meter = Meter()
    hf = {"ours": train_ours, "TRL": train_trl}[run.trainer](run, meter)
    (Path(run.folder) / "result.json").write_text(json.dumps({**meter.result(), "hf": str(hf)}))


def train_ours(run: Run, meter: Meter) -> Path:
    """train.py as it is. Its own stopwatch gives the phases."""

    def before_step(original, problems, step, *args):
        if step == 1:
            meter.start()
        return original(problems, step, *args)

    def counted(phase: str, size: Callable) -> Callable:
        def spy(original, owner, batch, *args):
            meter.positions[phase] += size(batch)
            return original(owner, batch, *args)

        return spy

    def logged(original, log, row, *args):
        meter.seconds.update({p: row["seconds"].get(p, 0.0) for p in PHASES if p != "rest"})
        meter.facts = {"reward": row["reward_mean"], "tokens": row["tokens"]}
        result = original(log, row, *args)
        meter.step()
        return result

    def tokens(batch) -> int:
        return len(batch.token_T)

    spies = (
        (train.data, "step_problems", before_step),
        (TorchEngine, "_forward", counted("rollout", torch.numel)),
        (Policy, "loss", counted("train", tokens)),
        (Policy, "logprob", counted("old", tokens)),
        (train.Log, "step", logged),
    )
    with ExitStack() as stack:
        for owner, name, spy in spies:
            stack.enter_context(mock.patch.object(owner, name, spying(getattr(owner, name), spy)))
        train.main(config_of(run))
    return Path(run.folder) / "run" / "hf"


def spying(original: Callable, spy: Callable) -> Callable:
    """A function in `original`'s place that calls `spy(original, *its arguments)`."""
    return lambda *args, **kwargs: spy(original, *args, **kwargs)


def metered_trainer(meter: Meter) -> type:
    """TRL's trainer, whose phases and positions `meter` gets."""
    from trl import GRPOTrainer

    class Metered(GRPOTrainer):
        def _prepare_inputs(self, *args):
            with meter.phase("pack"):
                return super()._prepare_inputs(*args)

        def _generate(self, *args):
            with meter.phase("rollout"):
                sampled = super()._generate(*args)
            lengths = [len(ids) for ids in sampled[1]]
            steps = len(lengths) * (max(lengths) - 1)
            meter.facts["tokens"] = sum(lengths)
            meter.positions["rollout"] += sum(map(len, sampled[0])) + steps
            return sampled

        def _calculate_rewards(self, *args):
            with meter.phase("grade"):
                rewards = super()._calculate_rewards(*args)
            meter.facts["reward"] = rewards.mean().item()
            return rewards

        def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
            phase = "train" if torch.is_grad_enabled() else "old"
            meter.positions[phase] += input_ids.numel()
            with meter.phase(phase):
                return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    return Metered


def meter_callback(meter: Meter, minibatches: int):
    """An optimizer step lasts from `on_step_begin` to `on_step_end`. Sampling happens inside the
    first one."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            meter.start()

        def on_step_begin(self, *args, **kwargs):
            self.phase = meter.phase("train")
            self.phase.__enter__()

        def on_step_end(self, args, state, *_, **kwargs):
            self.phase.__exit__(None, None, None)
            if state.global_step % minibatches == 0:
                meter.step()

    return Watch()


def train_trl(run: Run, meter: Meter) -> Path:
    from trl import GRPOConfig

    tokenizer, config = byte_tokenizer(), config_of(run)
    with Grader("hash") as grader:

        def reward(completions, completion_ids, answer, **_):
            """Ours: 0 or 1, and 0 where the response was cut off."""
            ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
            grades = [grader.submit(*pair) for pair in zip(completions, answer, strict=True)]
            return [g.result().score * end for g, end in zip(grades, ended, strict=True)]

        trainer = metered_trainer(meter)(
            model=run.model,
            reward_funcs=reward,
            args=GRPOConfig(**trl_arguments(config)),
            train_dataset=prompts_in_order(config),
            processing_class=tokenizer,
            callbacks=[meter_callback(meter, run.minibatches)],
        )
        trainer.train()
    trainer.save_model(f"{run.folder}/hf")
    return Path(run.folder) / "hf"


def trl_arguments(config: Config) -> dict:
    """TRL's names for the values of `config`, then what it takes to be quick on a CPU. The loss
    type alone would leave the division by the std in place."""
    return {
        **dict(output_dir=f"{config.out}-trl", seed=config.seed, shuffle_dataset=False),
        **dict(loss_type="dr_grpo", scale_rewards="none"),
        **dict(beta=config.kl_coef, epsilon=config.clip_low, temperature=config.temperature),
        **dict(num_generations=config.group_size, max_completion_length=config.max_new_tokens),
        **dict(max_steps=config.steps * config.minibatches, gradient_accumulation_steps=1),
        **dict(per_device_train_batch_size=config.minibatch_size),
        **dict(steps_per_generation=config.minibatches),
        **dict(learning_rate=config.lr, lr_scheduler_type="constant", optim="adamw_torch_fused"),
        **dict(adam_beta1=config.beta1, adam_beta2=config.beta2, weight_decay=config.weight_decay),
        **dict(max_grad_norm=config.max_grad_norm),
        "model_init_kwargs": {"dtype": config.dtype, "attn_implementation": "sdpa"},
        **dict(logging_strategy="no", save_strategy="no", disable_tqdm=True),
        **peer_losses.QUIET,
    }


def prompts_in_order(config: Config):
    """The prompts of every step as our trainer takes them. TRL repeats each one for its group."""
    from datasets import Dataset

    problems, template = data.load_problems(config.train_data), get_template(config.template)
    chosen = []
    for step in range(1, config.steps + 1):
        chosen += data.step_problems(problems, step, config.prompts_per_step, config.seed)
    prompts = [template.text.replace("{q}", p.question) for p in chosen]
    return Dataset.from_dict({"prompt": prompts, "answer": [p.answer for p in chosen]})


# ---- turns, and what comes of them


def launch(run: Run) -> dict:
    """The child's `result.json`. What it prints is shown if it fails."""
    Path(run.folder).mkdir(parents=True)
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    env = os.environ | one_thread | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "bench.experiments.peers", "--child", json.dumps(vars(run))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        output = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{run.trainer} failed with status {done.returncode}:\n{output}")
    return json.loads((Path(run.folder) / "result.json").read_text())


def measure_speed(args: argparse.Namespace, model: str, folder: Path, minibatches: int) -> dict:
    """trainer -> summary of its turns."""
    turns = {name: [] for name in TRAINERS}
    for turn, name in product(range(args.turns), TRAINERS):
        size = dict(seed=turn, steps=args.steps, minibatches=minibatches)
        run_folder = f"{folder}/{minibatches}-{turn}-{name}"
        run = Run(trainer=name, model=model, folder=run_folder, **size)
        result = launch(run)
        turns[name].append(result | {"accuracy": held_out(result["hf"], config_of(run))})
        message = f"# {minibatches} optimizer steps, turn {turn}, {name}"
        print(f"{message}: {mean_step(result):.3f} s/step", file=sys.stderr)
    return {name: summary(results) for name, results in turns.items()}


def held_out(hf: str, config: Config) -> dict[str, float]:
    """Accuracy on the held-out problems, greedy and sampled, with the repository's evaluator."""
    tokenizer, template = byte_tokenizer(), get_template(config.template)
    how = dict(dtype=torch.float32, device=torch.device("cpu"), batch=256, max_tokens=256)
    engine = TorchEngine(hf, tokenizer, **how)
    problems, _ = tokenize(data.load_problems("arithmetic_heldout"), template, tokenizer, 64)
    sampler, accuracy = Sampler(engine, tokenizer, seed=0), {}
    with Grader(template.answer) as grader:
        for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", 3, 1.0)):
            stop = dict(stop_token_ids=(tokenizer.eos_token_id,), temperature=temperature)
            sampling = Sampling(max_new_tokens=config.max_new_tokens, **stop)
            scored = evaluate(sampler, grader, problems, samples, sampling)
            accuracy[name] = summarize(scored)["accuracy"]
    return accuracy


def timed(result: dict) -> list[dict]:
    """The steps that count: without the first and the last."""
    return result["rows"][1:-1]


def mean_step(result: dict, clock: str = "total") -> float:
    """Seconds a step. `clock` "cpu" gives CPU seconds, which other work on the machine hardly
    changes."""
    return fmean(row[clock] for row in timed(result))


def summary(results: list[dict]) -> dict:
    """Medians over turns of means over steps. `results` are the turns of one trainer."""

    def over_turns(value: Callable[[dict], float]) -> float:
        return median(fmean(map(value, timed(result))) for result in results)

    def by_phase(key: str, phases: tuple[str, ...]) -> dict[str, float]:
        return {p: over_turns(lambda row, p=p: row[key].get(p, 0)) for p in phases}

    steps = [mean_step(result) for result in results]
    tokens = over_turns(lambda row: row["tokens"])
    curves = []
    for result in results:
        elapsed = list(accumulate(row["total"] for row in result["rows"]))
        curves.append({"seconds": elapsed, "reward": [row["reward"] for row in result["rows"]]})
    accuracy = {}
    for way in ("greedy", "sampled"):
        accuracy[way] = [result["accuracy"][way] for result in results]
    cpu_steps = [mean_step(result, "cpu") for result in results]
    return {
        "seconds": by_phase("seconds", PHASES),
        "steps": steps,
        "cpu_steps": cpu_steps,
        "tokens_per_s": tokens / median(steps),
        "tokens": tokens,
        "positions": by_phase("positions", PASSES),
        "peak_gb": max(map(itemgetter("peak_gb"), results)),
        "before_gb": max(map(itemgetter("before_gb"), results)),
        "late_reward": [fmean(curve["reward"][-10:]) for curve in curves],
        "accuracy": accuracy,
        "curves": curves,
    }


def speed_table(minibatches: str, trainers: dict) -> str:
    """Markdown, TRL against ours. The last column says by what factor ours is better or has less to
    do."""
    sides = [trainers[name] for name in TRAINERS]
    rows = []

    def add(title: str, values: list[float], form: str, more_is_better: bool = False) -> None:
        trl, ours = values
        better = ours / max(trl, 1e-9) if more_is_better else trl / max(ours, 1e-9)
        factor = f"{better:.1f}" if min(values) >= 5e-4 else "–"
        rows.append([title, *(f"{value:{form}}" for value in values), factor])

    def per_position(side: dict, phase: str) -> float:
        return 1e6 * side["seconds"][phase] / side["positions"][phase]

    for title, key in (("**s/step**, median (range)", "steps"), ("CPU-s/step", "cpu_steps")):
        factor = median(sides[0][key]) / median(sides[1][key])
        rows.append([title, *(spread(side[key], ".2f", median) for side in sides), f"{factor:.1f}"])
    for phase in PHASES:
        add(f"{phase}, s", [side["seconds"][phase] for side in sides], ".3f")
    for phase in PASSES:
        add(f"positions, {phase}", [side["positions"][phase] for side in sides], ",.0f")
    for phase in ("rollout", "train"):
        add(f"µs a position, {phase}", [per_position(side, phase) for side in sides], ".1f")
    add("sampled tokens a step", [side["tokens"] for side in sides], ",.0f")
    add("sampled tokens/s", [side["tokens_per_s"] for side in sides], ",.0f", more_is_better=True)
    add("peak memory, GB", [side["peak_gb"] for side in sides], ".2f")
    add("resident before step 1, GB", [side["before_gb"] for side in sides], ".2f")
    outcomes = {"reward, last 10 steps": [side["late_reward"] for side in sides]}
    for way in ("sampled", "greedy"):
        outcomes[f"held-out accuracy, {way}"] = [side["accuracy"][way] for side in sides]
    for title, turns in outcomes.items():
        rows.append([title, *(spread(values, ".2f") for values in turns), ""])
    head = f"{minibatches} optimizer step{'s' * (minibatches != '1')} a rollout"
    return markdown([head, "TRL", "ours", "factor"], rows)


def draw(speed: dict, path: Path) -> None:
    """Left: seconds a step, stacked by phase. Then, for each number of optimizer steps, reward
    against wall time."""
    size = (4.4 * (1 + len(speed)), 3.6)
    figure, (bars, *axes) = harness.new_figure(1, 1 + len(speed), size)
    seconds = {}
    for minibatches, trainers in speed.items():
        seconds |= {f"{name}, {minibatches}": side["seconds"] for name, side in trainers.items()}
    harness.stacked_bars(bars, seconds, PHASES)
    bars.set(title="seconds per step", ylabel="trainer, optimizer steps per rollout", xlabel="s")
    bars.legend(fontsize=7)
    for axis, (minibatches, trainers) in zip(axes, speed.items(), strict=True):
        for i, (name, side) in enumerate(trainers.items()):
            for turn, curve in enumerate(side["curves"]):
                style = dict(color=f"C{i}", lw=1.2, label=None if turn else name)
                axis.plot(curve["seconds"], smooth(curve["reward"]), **style)
        title = f"sampled reward, {minibatches} per rollout"
        axis.set(title=title, xlabel="wall time, s", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    harness.save_figure(figure, path, dpi=130)


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last `width` values, of fewer at the start."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=30, help="rollouts of a run, 3 or more (30)")
    add("--turns", type=int, default=3, help="runs of each trainer, seeds 0, 1, ... (3)")
    add("--minibatches", type=int, nargs="+", default=[4, 1], help="optimizer steps (4 1)")
    add("--out", type=Path, default=RESULTS / "peers", help="without suffix")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: the first and last are not timed, so choose 3 or more")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        return child(Run(**json.loads(args.child)))
    require_peers()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    distributed.start()
    log = partial(print, "#", file=sys.stderr)
    model = str(cached_tiny_model(Warmup(), ROOT / "runs" / "warmup", log))
    where = harness.provenance() | {name: installed(name) for name in PEERS}
    report = {"where": where, "steps": args.steps, "turns": args.turns}
    with tempfile.TemporaryDirectory() as folder:
        report["loss"] = peer_losses.measure_loss(model, Path(folder))
        report["advantage"] = peer_losses.measure_advantages(model, Path(folder))
        losses, advantages = report["loss"], report["advantage"]
        tables = peer_losses.loss_table(losses), peer_losses.advantage_table(advantages)
        print(*tables, peer_losses.WHY, sep="\n\n", end="\n\n", flush=True)
        report["speed"] = speed = {}
        for minibatches in args.minibatches:
            speed[str(minibatches)] = measure_speed(args, model, Path(folder), minibatches)
            print(speed_table(str(minibatches), speed[str(minibatches)]), end="\n\n", flush=True)
    distributed.stop()
    draw(speed, args.out.with_suffix(".png"))
    print(harness.write_json(args.out.with_suffix(".json"), report))


if __name__ == "__main__":
    main()
