"""Train a language model with Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).

Dr. GRPO is GRPO with two deletions. The advantage of a response is its reward minus the mean of its
group, not divided by the group's standard deviation; and the sum over its tokens is divided by a
constant, not by its own length:

    L = -(1/B) sum_i (1/C) sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i),    rho = exp(logp - logp_old)

    on a laptop     make train                                                      (or the next line with --recipe tiny)
    one node        torchrun --standalone --nproc-per-node=8 train.py --recipe oat_zero_7b --out runs/oat-zero-7b
    every option    python train.py --help

The file reads top to bottom: config, setup, then the loop

    Problem -> rollout -> Rollout -> grade -> reward_PG -> advantage_PG -> pack -> Batch -> update
    -> weights -> sync -> engine
"""

import json
import math
import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from drgrpo import data, distributed, pack, parity, replay
from drgrpo.advantage import group_advantage, token_weight
from drgrpo.config import Config, parse_args
from drgrpo.engine import make_engine, resolve_engine, stop_token_ids
from drgrpo.evaluation.evaluate import evaluate, summarize
from drgrpo.grade import Grader
from drgrpo.model import Objective, Policy, load_policy, max_positions, resolve_attention
from drgrpo.rollout import rollout, tokenize
from drgrpo.run import checkpoint
from drgrpo.run.flops import peak_flops, training_flops
from drgrpo.run.guard import Stopper, Watchdog
from drgrpo.run.log import Log, Stopwatch, read_jsonl
from drgrpo.run.memory import make_ledger
from drgrpo.run.metrics import sample_rows, step_row
from drgrpo.templates import get_template
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, cached_tiny_model
from drgrpo.types import Batch, Rollout, Sampling, UserError

MAX_SKIPPED_IN_A_ROW = 3  # optimizer steps with a non-finite gradient


def main(config: Config) -> None:
    # ---- check everything that can be wrong before anything expensive
    checkpoint.claim(config)
    template = get_template(config.template)
    notices: list[str] = []
    problems = data.load_problems(
        config.train_data,
        problem_field=config.problem_field,
        answer_field=config.answer_field,
        say=notices.append,
    )
    eval_sources = [name.strip() for name in config.eval_data.split(",") if name.strip()]
    eval_sets = {name: data.load_problems(name, say=notices.append) for name in eval_sources}

    # ---- setup: processes, log, prompts
    rank, world, device = distributed.start()
    transformers.utils.logging.disable_progress_bar()
    log, dtype = Log(config.out, active=rank == 0), getattr(torch, config.dtype)
    stopper, watchdog = Stopper(config.max_hours), Watchdog(rank, config.watchdog_minutes)
    engine_name = resolve_engine(config.engine, device)
    if world % config.tp:
        raise UserError(f"--tp {config.tp} does not divide the {world} processes")
    log.say(f"config: {json.dumps(asdict(config))}")
    log.say(f"derived: {config.derived()}")
    for notice in notices:
        log.say(f"data: {notice}")

    tiny, warmup = config.model == "tiny", Warmup(seed=config.seed)
    tokenizer = byte_tokenizer() if tiny else AutoTokenizer.from_pretrained(config.model)
    positions = warmup.max_position_embeddings if tiny else max_positions(config.model)
    longest = min(config.max_prompt_tokens, positions - config.max_new_tokens)
    problems, dropped = tokenize(problems, template, tokenizer, longest)
    log.say(
        f"data: {len(problems)} training problems, {dropped} dropped for a prompt of more than {longest} tokens"
    )
    eval_dropped = {}
    for name in eval_sets:
        eval_sets[name], eval_dropped[name] = tokenize(
            eval_sets[name], template, tokenizer, longest
        )
        log.say(
            f"data: {name}, {len(eval_sets[name])} problems, {eval_dropped[name]} too long (they count as wrong); "
            f"{len(data.overlap(problems, eval_sets[name]))} of them among the training problems"
        )

    # ---- setup: policy, optimizer, newest checkpoint
    model_path = config.model
    if tiny:
        with distributed.rank_zero_first():
            model_path = str(cached_tiny_model(warmup, config.cache_dir, log.say))
    options = {
        "dtype": dtype,
        "device": device,
        "attention": config.attention,
        "kernel": config.kernel,
        "dp_replicate": config.dp_replicate,
    }
    policy = load_policy(
        model_path, checkpointing=config.checkpointing, compile=config.compile, **options
    )
    reference = load_policy(model_path, **options).requires_grad_(False) if config.kl_coef else None
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    resume_from = checkpoint.newest_whole(config, log.say)
    done = (
        checkpoint.load(resume_from, policy, optimizer)
        if resume_from
        else {"step": 0, "hours_used": 0.0}
    )

    # ---- setup: sampler. The process group exists before vLLM does, which would make one of its
    # own.
    gpu_bytes = (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    )
    ledger = make_ledger(
        policy.lm.config,
        policy.lm.num_parameters(),
        shards=world // config.dp_replicate,
        bytes_each=dtype.itemsize,
        checkpointing=config.checkpointing,
        microbatch=config.tokens_per_microbatch,
        max_tokens=longest + config.max_new_tokens,
        sequences=config.sampler_batch,
        tp=config.tp,
        kv_cache_gb=config.kv_cache_gb,
        sleep=config.sleep,
        gpu_bytes=gpu_bytes,
        reference=bool(config.kl_coef),
    )
    log.say(str(ledger))

    def build_sampler():
        engine = make_engine(
            engine_name,
            model_path,
            tokenizer,
            dtype=dtype,
            device=device,
            batch=config.sampler_batch,
            max_tokens=longest + config.max_new_tokens,
            kv_cache_gb=ledger.kv_cache,
            tp=config.tp,
            sleep=ledger.sleep,
        )
        engine.sync(policy.named_weights(dtype))
        return engine

    engine, rebuilt = build_sampler(), False
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop=template.stop,
        stop_token_ids=stop_token_ids(model_path, tokenizer),
    )
    objective = Objective(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        tis_cap=config.tis_cap or None,
        temperature=config.temperature,
        kl_coef=config.kl_coef,
    )
    kernel = (
        config.kernel if config.kernel != "auto" else "triton" if device.type == "cuda" else "torch"
    )
    attention = resolve_attention(config.attention, device, dtype)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
    log.say(
        f"runs on: {world} x {device.type}, {config.dtype}; engine {engine.name}, attention {attention}, kernel {kernel}; "
        f"{versions}; {policy.lm.num_parameters():,} parameters"
    )
    if config.dry_run:
        return dry_run(config, policy, objective, longest, device, log)
    if rank == 0:
        checkpoint.open_run(config, done["step"])
    log.track(config.tensorboard, config.wandb, asdict(config))

    # ---- loop
    def evaluate_all(step: int) -> None:
        asked = [problem for eval_problems in eval_sets.values() for problem in eval_problems]
        ways = [replace(sampling, temperature=0.0)] + [sampling] * bool(config.eval_samples)
        for way in ways if asked else []:
            samples = 1 if way.temperature == 0 else config.eval_samples
            # all sets in one call: the sampler waits for the last long response once, not once per
            # set
            scored = iter(
                evaluate(
                    engine, tokenizer, grader, asked, samples, way, config.seed, step, config.tp
                )
            )
            for name, eval_problems in eval_sets.items():
                mine = list(islice(scored, samples * len(eval_problems)))
                row = {
                    "step": step,
                    "benchmark": name,
                    **summarize(mine, eval_dropped[name]),
                    "samples": samples,
                    "temperature": way.temperature,
                    "max_new_tokens": way.max_new_tokens,
                    "template": config.template,
                }
                log.record("eval", row)
                log.evaluation(row)

    if done["step"] >= config.steps:
        log.say(
            f"{config.out} is complete at step {done['step']}: raise --steps to train on, or choose another --out"
        )
    elif done["step"]:
        log.say(f"resumed from {resume_from} after step {done['step']}")
    hours_before, started, skipped_in_a_row = done["hours_used"], time.perf_counter(), 0
    peak = peak_flops(device)

    with Grader(template.answer) as grader, log.steps(done["step"] + 1, config.steps) as steps:
        if done["step"] == 0:
            evaluate_all(step=0)
        for step in steps:
            watch = Stopwatch(watchdog.enter)
            prompts = data.step_problems(problems, step, config.prompts_per_step, config.seed)

            # each process samples its share of the prompts, with the weights of the last sync;
            # grading goes on meanwhile
            with watch("rollout"):
                try:
                    mine, submitted, crash = (
                        *sample(config, engine, tokenizer, prompts, sampling, step, grader),
                        None,
                    )
                except Exception as error:
                    crash = error
                if distributed.anywhere(crash is not None):
                    if rebuilt:
                        raise RuntimeError(
                            "the sampler crashed again after it was rebuilt"
                        ) from crash
                    log.say(
                        f"WARNING: a sampler crashed ({crash!r} here): rebuilding it from the current weights, once"
                    )
                    grader.collect()
                    engine.sleep()
                    wreck = engine  # noqa: F841 kept: when it goes, vLLM takes the process group with it
                    engine, rebuilt = build_sampler(), True
                    mine, submitted = sample(
                        config, engine, tokenizer, prompts, sampling, step, grader
                    )
            with watch(
                "grade"
            ):  # what is left of it; a truncated response earns nothing, whatever it says
                grades = dict(zip(submitted, grader.collect(), strict=True))
                rewards = [grades[i].score * r.completion.finished for i, r in enumerate(mine)]

            with watch("pack"):
                groups = [
                    slice(i, i + config.group_size) for i in range(0, len(mine), config.group_size)
                ]
                shared = distributed.gather([(mine[g], rewards[g]) for g in groups], config.tp)
                rollouts = [r for group, _ in shared for r in group]
                reward_PG = torch.tensor([rewards for _, rewards in shared])
                advantage_PG = group_advantage(reward_PG, config.algo)
                engine.sleep()
                updates = plan_updates(config, rollouts, advantage_PG, step, rank, world, device)

            with watch(
                "old"
            ):  # the ratio's denominator, before any of this step's updates; and the reference, if any
                old = [
                    [old_logprob(config, policy, b, objective) for b in batches]
                    for batches in updates
                ]
                ref = [
                    [logprob(reference, b, objective) if reference else None for b in batches]
                    for batches in updates
                ]
            stats = []
            with watch("train"):
                for i, batches in enumerate(updates):
                    lr = warm_lr(config, (step - 1) * config.minibatches + i)
                    stats.append(
                        train_minibatch(
                            config,
                            policy,
                            optimizer,
                            [*zip(batches, old[i], ref[i], strict=True)],
                            objective,
                            lr,
                            check_parity=i == 0,
                        )
                    )
                    skipped_in_a_row = 0 if stats[-1]["applied"] else skipped_in_a_row + 1
                    if not stats[-1]["applied"]:
                        torch.save(
                            batches,
                            Path(config.out)
                            / f"nonfinite-step-{step:06d}-update-{i}-rank-{rank}.pt",
                        )
                    if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                        raise FloatingPointError(
                            f"{skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient; their batches are "
                            f"in {config.out}/nonfinite-*.pt, and the last checkpoint is unharmed: resume with a lower --lr"
                        )
            with watch(
                "sync"
            ):  # new weights -> sampler: from here on it draws from the updated policy
                engine.wake()
                engine.sync(policy.named_weights(dtype))

            stopping = distributed.anywhere(stopper.asked() is not None)
            last = step == config.steps
            with watch("eval"):
                if last or (config.eval_every and step % config.eval_every == 0):
                    evaluate_all(step)
            hours_used = hours_before + (time.perf_counter() - started) / 3600
            saving = last or stopping or bool(config.save_every and step % config.save_every == 0)
            with watch("save"):
                if saving:
                    checkpoint.write(
                        config, step, policy, optimizer, tokenizer, dtype, hours_used, versions
                    )

            row = step_row(
                step, config.algo, rollouts, reward_PG, advantage_PG, stats, watch.read()
            )
            trained = [
                r
                for r, a in zip(rollouts, advantage_PG.flatten().tolist(), strict=True)
                if a or not config.drops
            ]
            flops = (
                training_flops(policy.lm, [(len(r.problem.prompt_ids), r.length) for r in trained])
                / world
            )
            speed = flops / watch.seconds["train"]
            row |= {
                "tflops": speed / 1e12,
                "mfu": speed / peak if peak else None,
                "grader_timeout": grader.timeouts,
                "grader_error": grader.errors,
                "gb": {phase: round(gb, 3) for phase, gb in watch.gb.items()},
                "hours_used": hours_used,
            }
            log.record("metrics", row)
            log.record("samples", *sample_rows(step, rollouts, reward_PG, config.samples_logged))
            if config.dump_rollouts and rank == 0:
                replay.dump(Path(config.out) / "rollouts", step, rollouts)
            if saving and rank == 0:  # the records are there: now the checkpoint may count
                checkpoint.commit(config, step)
            log.step(row, config.steps, config.budget_hours)
            if stopping and not last:
                why = stopper.asked() or "another process was asked to"
                log.say(f"stopping after step {step}: {why}; the same command resumes")
                break

    # ---- what came of it
    watchdog.enter("finish")
    probe = rollout(
        engine,
        tokenizer,
        distributed.share(problems[: 8 * world], config.tp),
        4,
        sampling,
        config.seed,
        -1,
    )
    packed = pack.pack([sequence(r, 0.0) for r in probe], device)
    gap_sum, gap_max, tokens = parity.difference(
        logprob(policy, packed, objective), packed.sampler_logprob_N
    )
    log.say(
        f"after the last sync: |trainer - sampler| is {gap_sum / tokens:.1e} nats on average, {gap_max:.1e} at most, "
        f"over {tokens} tokens"
    )
    parity.check(gap_sum / tokens, gap_max, dtype, config.parity_mean, config.parity_max)
    if rank == 0:
        from drgrpo.run.plot import plot

        log.table(
            read_jsonl(log.out / "eval.jsonl"),
            f"{config.out}: {config.algo}, {config.recipe}, seed {config.seed}",
        )
        figures = plot([config.out])
        log.say(
            f"wrote {log.out}/metrics.jsonl, samples.jsonl, eval.jsonl, {', '.join(f.name for f in figures)} in plots/, "
            f"and {log.out}/hf for transformers, vLLM and eval.py"
        )
    dist.barrier()
    engine.close()


def sample(
    config: Config, engine, tokenizer, prompts, sampling: Sampling, step: int, grader: Grader
):
    """This process's rollouts, group by group, and their indices in the order in which the grader
    got them."""
    submitted = []

    def submit(i: int, r: Rollout) -> None:
        submitted.append(i)
        grader.submit(r.text, r.problem.answer)

    if not config.replay:
        mine = distributed.share(prompts, config.tp)
        return rollout(
            engine, tokenizer, mine, config.group_size, sampling, config.seed, step, submit
        ), submitted
    dumped, g = replay.load(config.replay, step, prompts), config.group_size
    mine = [
        r
        for group in distributed.share(
            [dumped[i : i + g] for i in range(0, len(dumped), g)], config.tp
        )
        for r in group
    ]
    for i, r in enumerate(mine):
        submit(i, r)
    return mine, submitted


def plan_updates(
    config: Config,
    rollouts: list[Rollout],
    advantage_PG: torch.Tensor,
    step: int,
    rank: int,
    world: int,
    device: torch.device,
) -> list[list[Batch]]:
    """This process's packed micro-batches of every optimizer step: [minibatches][micro-batches].

    Who belongs to which optimizer step is drawn first. Then responses without advantage are
    dropped: their gradient is exactly zero and the normalizer does not count them, so this changes
    time and memory only."""
    advantage_B = advantage_PG.flatten().tolist()
    updates = []
    for chosen in pack.minibatches(len(rollouts), config.minibatches, config.seed, step):
        weights = token_weight(
            torch.tensor([rollouts[i].length for i in chosen]), config.algo, config.max_new_tokens
        )
        weight = dict(zip(chosen, weights.tolist(), strict=True))
        kept = [i for i in chosen if advantage_B[i] != 0 or not config.drops]
        lengths = {i: len(rollouts[i].problem.prompt_ids) + rollouts[i].length for i in kept}
        plan = pack.microbatches(lengths, world, config.tokens_per_microbatch)[rank]
        updates.append(
            [
                pack.pack(
                    [sequence(rollouts[i], advantage_B[i] * weight[i]) for i in indices], device
                )
                for indices in plan
            ]
        )
    return updates


def sequence(r: Rollout, advantage: float) -> tuple[list[int], list[int], list[float], float]:
    return r.problem.prompt_ids, r.completion.token_ids, r.completion.logprobs, advantage


@torch.no_grad()
def logprob(policy: Policy, batch: Batch, objective: Objective) -> torch.Tensor:
    return policy(batch, objective)[0]


def old_logprob(
    config: Config, policy: Policy, batch: Batch, objective: Objective
) -> torch.Tensor | None:
    """The ratio's denominator: what the sampler reported, what the policy says before this step's
    updates (the paper's way), or the policy's own log-prob at every update (None: ratio 1)."""
    if config.old_logprob == "sampler":
        return batch.sampler_logprob_N
    return logprob(policy, batch, objective) if config.old_logprob == "recompute" else None


def train_minibatch(
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    micro_batches: list,
    objective: Objective,
    lr: float,
    check_parity: bool,
) -> dict:
    """One optimizer step over (Batch, old, reference log-probs) of each micro-batch; what happened,
    over all processes."""
    # Dr. GRPO (2/2): constant normalizer, not response length. FSDP2 averages gradients over
    # processes: undo it.
    scale = dist.get_world_size() / (config.minibatch_size * config.max_new_tokens)
    tallies = []
    for batch, old_logprob_N, ref_logprob_N in micro_batches:
        loss, stats = policy(batch, objective, old_logprob_N, ref_logprob_N, scale)
        loss.backward()
        tallies.append(tally(batch, loss.detach() / dist.get_world_size(), stats))
    sums = torch.stack([sums for sums, _ in tallies]).sum(0).cpu()  # the one wait for the device
    peaks = torch.stack([peaks for _, peaks in tallies]).amax(0).cpu()
    dist.all_reduce(sums)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    (tokens, gap_sum, clipped, loss, kl_sum), (gap_max, ratio_max) = sums.tolist(), peaks.tolist()
    if (
        check_parity and tokens and math.isfinite(loss)
    ):  # still before the first update: the sampler held these weights
        parity.check(
            gap_sum / tokens,
            gap_max,
            getattr(torch, config.dtype),
            config.parity_mean,
            config.parity_max,
        )

    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    grad_norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
    applied = math.isfinite(grad_norm) and math.isfinite(loss)
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return {
        "tokens": tokens,
        "gap_sum": gap_sum,
        "gap_max": gap_max,
        "clipped": clipped,
        "ratio_max": ratio_max,
        "kl_sum": kl_sum,
        "loss": loss,
        "grad_norm": grad_norm,
        "applied": applied,
        "lr": lr,
    }


def tally(
    batch: Batch, loss: torch.Tensor, stats: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one micro-batch adds to its optimizer step's statistics, left on the device: (sums of
    tokens, parity gaps, clipped tokens, loss and KL; largest gap and ratio)."""
    gap_N = (stats["logprob"] - batch.sampler_logprob_N).abs()
    count, kl = (
        loss.new_tensor(len(gap_N)),
        stats["kl"].sum() if "kl" in stats else loss.new_zeros(()),
    )
    sums = torch.stack([count, gap_N.sum(), (stats["clipped"] != 0).sum(), loss, kl]).double()
    if not len(gap_N):
        return sums, sums.new_zeros(2)
    return sums, torch.stack([gap_N.max(), stats["log_ratio"].max().exp()]).double()


def warm_lr(config: Config, update: int) -> float:
    """Constant, after a linear warm-up over the first `warmup_steps` optimizer steps (the paper has
    none)."""
    return (
        config.lr * min(1.0, (update + 1) / config.warmup_steps)
        if config.warmup_steps
        else config.lr
    )


def dry_run(
    config: Config,
    policy: Policy,
    objective: Objective,
    longest: int,
    device: torch.device,
    log: Log,
) -> None:
    """The fullest micro-batch, forward and backward: does it fit, and how long does training take
    at most?"""
    length = longest + config.max_new_tokens
    count = max(1, config.tokens_per_microbatch // length)
    response = [1] * config.max_new_tokens
    batch = pack.pack([([1] * longest, response, [-1.0] * len(response), 1.0)] * count, device)
    for _ in range(2):  # the first one also compiles
        watch = Stopwatch()
        with watch("train"):
            policy(batch, objective, scale=1.0)[0].backward()
        policy.zero_grad()
    responses = config.rollouts_per_step / dist.get_world_size()
    hours = config.steps * responses / count * watch.seconds["train"] / 3600
    log.say(
        f"dry run: a micro-batch of {count} x {length} tokens takes {watch.seconds['train']:.2f} s and "
        f"{watch.gb['train']:.2f} GB; {config.steps} steps in which no response is short or dropped would train for "
        f"{hours:.1f} h"
    )


def cli(argv: list[str] | None = None) -> None:
    try:
        config = parse_args(argv)
        if config.print_config:
            print(json.dumps(asdict(config), indent=2), config.derived(), sep="\n")
        else:
            main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    cli()
