"""Train a language model with Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).

Dr. GRPO is GRPO with two deletions. The advantage of a response is its reward minus the mean of its
group, not divided by the group's standard deviation. The sum over the response's tokens is divided
by a constant, not by the response's own length:

    L = -(1/B) sum_i (1/C) sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)

with rho = exp(logprob - old_logprob), B responses in an optimizer step, C the generation budget.

    on a laptop     make train
    one node        torchrun --standalone --nproc-per-node=8 train.py --recipe oat_zero_7b
    every option    python train.py --help

The file reads top to bottom: setup, then the loop

    Problem -> rollout -> Rollout -> reward_PG -> advantage_PG -> pack -> Batch -> update -> sync
"""

from drgrpo import data
from drgrpo.config import Config, parse_args
from drgrpo.run import folder, hub
from drgrpo.run.cli import hard_exit, user_errors

if __name__ == "__main__":  # a mistake is answered before torch is imported, which takes seconds
    with user_errors():
        CONFIG = parse_args()
        folder.check(CONFIG)
        data.check_sources(CONFIG)
        hub.check(CONFIG)

import json
import math
import time
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from drgrpo import distributed, pack, parity
from drgrpo.advantage import group_advantage, mismatch_weight, token_weight
from drgrpo.engine import make_engine, stop_token_ids
from drgrpo.evaluation.evaluate import evaluate_sets
from drgrpo.grade import Grade, Grader
from drgrpo.lora import Adapter, reference_model
from drgrpo.model import Policy, Reference, load_policy, load_tokenizer, make_objective
from drgrpo.rollout import Sampler, longest_prompt, tokenize_sets, with_grades
from drgrpo.run import checkpoint, provenance, report, summary
from drgrpo.run.dry_run import dry_run
from drgrpo.run.flops import utilization
from drgrpo.run.guard import NonFinite, Stopper, Watchdog, advance
from drgrpo.run.log import Log, Stopwatch
from drgrpo.run.memory import ledger_of
from drgrpo.run.metrics import Tally, Update, step_row
from drgrpo.run.samples import sample_rows
from drgrpo.templates import get_template
from drgrpo.types import Batch, Rollout, Sampling
from drgrpo.warmup import initial_model


def main(config: Config) -> None:
    # ---- Setup: the process group, and what watches over the run.
    folder.check(config)
    rank, world, device = distributed.start(config.tp or 1, config.dp_replicate)
    log, dtype = Log(config.out, active=rank == 0), getattr(torch, config.dtype)
    log.say(f"config: {json.dumps(asdict(config))}\nderived: {config.derived()}")
    stopper, watchdog = Stopper(config.max_hours), Watchdog(rank, config.watchdog_minutes)
    nonfinite = NonFinite(config.folder, rank)

    # ---- Setup: prompts.
    template = get_template(config.template, config.answer, config.system)
    sets = data.load_sets(config, log.say)
    model_path = initial_model(config, log.say)
    tokenizer = load_tokenizer(model_path)
    longest = longest_prompt(model_path, config.max_prompt_tokens, config.max_new_tokens)
    problems, eval_sets, dropped = tokenize_sets(*sets, template, tokenizer, longest, log.say)

    # ---- Setup: policy and optimizer, from the newest checkpoint if there is one.
    policy, reference, optimizer = load_policies(config, model_path, device)
    done = checkpoint.resume(config, policy, optimizer, log.say)
    carry = checkpoint.carry_over(config, done.step, problems)

    # ---- Setup: the sampler. It comes after the process group: vLLM would make one of its own.
    ledger = ledger_of(config, policy.lm, longest, world, device)
    config = replace(config, tp=ledger.tp)
    room = (longest + config.max_new_tokens, ledger.kv_cache, ledger.sleep)
    engine = make_engine(config, model_path, tokenizer, device, *room, load_weights=False)
    engine.sync(policy.named_weights(dtype))
    sampler = Sampler(engine, tokenizer, config.seed, config.tp)
    stop_ids = stop_token_ids(model_path, tokenizer)
    sampling = Sampling(config.max_new_tokens, stop_ids, config.temperature, template.stop)
    summary.start(config, policy, engine.name, ledger, device, log)
    if config.dry_run:
        dry_run(config, policy, optimizer, engine, longest, log)
        return engine.close()
    if rank == 0:
        folder.open_run(config, done.step, provenance.machine(device.type))
    log.track(config.tensorboard, config.wandb, asdict(config))
    started = time.monotonic() - 3600 * done.hours_used

    def evaluate(step: int) -> None:
        modes = [(1, replace(sampling, temperature=0.0))]
        if config.eval_samples:
            modes.append((config.eval_samples, sampling))
        for samples, mode in modes:
            for row in evaluate_sets(sampler, grader, eval_sets, dropped, samples, mode, step):
                log.evaluation(row | {"template": config.template})

    # ---- The loop: seven blocks a step.
    with Grader(template.answer, reward=config.reward) as grader:
        if done.step == 0:
            evaluate(step=0)
        for step in range(done.step + 1, config.steps + 1):
            timer, group = Stopwatch(watchdog.enter), config.group_size
            prompts = data.step_problems(problems, step, config.prompts_per_step, config.seed)

            # 1. Every process samples its share of the responses. Grading starts with the first.
            with timer("rollout"):
                rollouts, grades = sampler.rollout(prompts, group, sampling, step, grader, carry)

            # 2. Each response gets its reward. Then every process gets all complete groups.
            with timer("grade"):
                rollouts = with_grades(rollouts, grades)
                rewards = [reward(rollout, rollout.grade) for rollout in rollouts]
            with timer("pack"):
                engine.sleep()
                rollouts, reward_PG = carry.split(*sampler.gather(rollouts, rewards, group))

                # 3. A response is compared with its group. Then responses are dealt to optimizer
                #    steps, processes and micro-batches.
                finished = [rollout.completion.finished for rollout in rollouts]
                finished_PG = torch.tensor(finished).view_as(reward_PG)
                advantage_PG = group_advantage(reward_PG, config.algo, finished_PG)
                plan = plan_updates(config, rollouts, advantage_PG, step, device)

            # 4. The ratio divides by log-probs from before the first update.
            with timer("old"):
                add_logprobs(config, policy, reference, plan)

            # 5. One optimizer step for each minibatch.
            with timer("train"):
                updates, sizes = [], pack.sizes(len(rollouts), config.minibatches)
                for i, (batches, B) in enumerate(zip(plan, sizes, strict=True)):
                    lr = learning_rate(config, (step - 1) * config.minibatches + i)
                    updates += [train_minibatch(config, policy, optimizer, batches, lr, i == 0, B)]
                    nonfinite.check(not updates[-1].failed, batches, step, i)

            # 6. The sampler gets the new weights.
            with timer("sync"):
                engine.sync(policy.named_weights(dtype))

            # 7. Evaluate, save, log, and stop if asked to.
            stopping = distributed.any_rank(stopper.reason is not None)
            saving = stopping or config.saves(step)
            with timer("eval"):
                if config.evaluates(step):
                    evaluate(step)
            now = checkpoint.Progress(step, (time.monotonic() - started) / 3600, carry.pending)
            with timer("save"):
                if saving:
                    checkpoint.write(config, now, policy, optimizer, tokenizer)
            row = step_row(config, now, rollouts, reward_PG, advantage_PG, updates, timer, grader)
            row |= utilization(config, policy.lm, rollouts, advantage_PG, timer, device)
            samples = sample_rows(step, rollouts, reward_PG, advantage_PG, tokenizer)
            log.step(row, samples, config.steps)
            if saving and rank == 0:  # the step's records are on disk: the checkpoint may count
                checkpoint.commit(config, step)
                report.refresh(log)
            if stopping and step < config.steps:
                why = stopper.reason or "another process was asked to"
                log.say(f"stopping after step {step}: {why}; the same command resumes")
                break

    # ---- The end: check that the last weights arrived, then show a table and figures.
    watchdog.enter("finish")
    gap = parity.probe(sampler, policy, problems, sampling, config.tokens_per_microbatch)
    parity.check(*gap, dtype, config.parity, log.say)
    summary.finish(config, log)
    dist.barrier()
    engine.close()
    watchdog.rest()


def reward(rollout: Rollout, grade: Grade) -> float:
    """What `--reward` names: by default 1 for a right answer, 0 if wrong or truncated."""
    return grade.reward


def load_policies(
    config: Config, path: str, device: torch.device
) -> tuple[Policy, Reference, torch.optim.Optimizer]:
    """The policy, the reference model of a KL penalty if there is one, and the optimizer."""
    load = partial(
        load_policy,
        path,
        make_objective(config, device),
        dtype=getattr(torch, config.dtype),
        device=device,
        attention=config.attention,
        kernel=config.kernel,
        dp_replicate=config.dp_replicate,
    )
    adapter = Adapter(config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    policy = load(adapter=adapter, checkpointing=config.checkpointing, compile=config.compile)
    reference = reference_model(policy, load) if config.kl_coef else None
    trained = [p for p in policy.parameters() if p.requires_grad]
    lr, betas, decay = config.lr, (config.beta1, config.beta2), config.weight_decay
    return policy, reference, torch.optim.AdamW(trained, lr, betas, weight_decay=decay, fused=True)


def plan_updates(
    config: Config, rollouts: list[Rollout], advantage_PG: Tensor, step: int, device: torch.device
) -> pack.Plan:
    """This process's packed micro-batches of every optimizer step.

    Responses without advantage are skipped once every response has its optimizer step. Their
    gradient is exactly zero, so that skipping them changes time and memory only."""
    advantages, plan = advantage_PG.flatten().tolist(), []
    for chosen in pack.minibatches(len(rollouts), config.minibatches, config.seed, step):
        length_B = torch.tensor([rollouts[i].length for i in chosen])
        weights = token_weight(length_B, config.algo, config.max_new_tokens).tolist()
        sequences = {
            i: pack.sequence(rollouts[i], advantages[i] * weight)
            for i, weight in zip(chosen, weights, strict=True)
            if advantages[i] != 0 or not config.drops_zero_advantage
        }
        rank, world, budget = dist.get_rank(), dist.get_world_size(), config.tokens_per_microbatch
        plan.append(pack.shard(sequences, rank, world, budget, device))
    return plan


def add_logprobs(config: Config, policy: Policy, reference: Reference, plan: pack.Plan) -> None:
    """The denominator of the ratio: the sampler's log-probs, or the policy's before this step's
    updates (the paper). Without one the ratio is 1, as it is in the first update anyway."""
    for i, batches in enumerate(plan):
        for batch in batches:
            if config.old_logprob == "sampler":
                batch.old_logprob_N = batch.sampler_logprob_N
            elif config.old_logprob == "recompute" and (i > 0 or config.masks_mismatch):
                batch.old_logprob_N = policy.logprob(batch)
            if config.masks_mismatch:
                batch.advantage_N *= mismatch_weight(batch, config.algo, config.tis_cap)
            if reference:
                batch.ref_logprob_N = reference.logprob(batch)


def train_minibatch(
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    lr: float,
    check_parity: bool = False,
    B: int | None = None,
) -> Update:
    """One optimizer step over B responses, by default `minibatch_size`. Returns its statistics."""
    # Dr. GRPO (2/2): constant normalizer, not response length. FSDP2 averages gradients over
    # processes, and the world size turns the average into a sum.
    scale = dist.get_world_size() / ((B or config.minibatch_size) * config.max_new_tokens)
    tally = Tally()
    for batch in batches:
        # The unfused loss, with A = batch.advantage_N and old = batch.old_logprob_N:
        #     ratio = exp(logprob - old)
        #     loss = -scale * sum(min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A))
        # kernels/linear_drgrpo.py computes it together with the LM head and its gradients.
        loss, stats = policy.loss(batch, scale)
        policy.scaler.scale(loss).backward()
        tally.add(batch, loss, stats)
    sums = tally.reduce()
    finite = math.isfinite(sums["loss"])
    if check_parity and sums["fresh"] and finite:  # the sampler still holds these weights
        gap, dtype = sums["gap_sum"] / sums["fresh"], getattr(torch, config.dtype)
        parity.check(gap, sums["gap_max"], dtype, config.parity)

    policy.scaler.unscale_(optimizer)
    total = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    applied = finite and math.isfinite(norm)
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return Update(**sums, grad_norm=norm, applied=applied, lr=lr, loss_scale=advance(policy.scaler))


def learning_rate(config: Config, update: int) -> float:
    """Constant, after a linear warm-up over `warmup_steps` optimizer steps (the paper has none)."""
    return config.lr * min(1.0, (update + 1) / max(1, config.warmup_steps))


if __name__ == "__main__":
    with hard_exit(), user_errors():
        main(CONFIG)
        distributed.stop()
        hub.push(CONFIG)
