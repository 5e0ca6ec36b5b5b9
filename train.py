"""Train a language model with Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).

Dr. GRPO is GRPO with two deletions. The advantage of a response is its reward minus the mean of its group, not divided by
the group's standard deviation; and the sum over its tokens is divided by a constant, not by its own length:

    L = -(1/B) sum_i (1/C) sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i),    rho = exp(logp - logp_old)

    on a laptop     make train                                                      (or the next line with --recipe tiny)
    one node        torchrun --standalone --nproc-per-node=8 train.py --recipe oat_zero_7b --out runs/oat-zero-7b
    every option    python train.py --help

The file reads top to bottom: config, setup, then the loop

    Problem -> rollout -> Rollout -> grade -> reward_PG -> advantage_PG -> pack -> Batch -> update -> weights -> sync -> engine
"""

import math
import sys
import time
from dataclasses import asdict
from statistics import fmean

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from drgrpo import checkpoint, data, distributed, pack, parity
from drgrpo.advantage import group_advantage, token_weight
from drgrpo.config import Config, parse_args
from drgrpo.engine import Sampling, make_engine, resolve_engine, stop_token_ids
from drgrpo.evaluate import evaluate, mean, summarize
from drgrpo.grade import Grader
from drgrpo.log import Log, Stopwatch, read_jsonl
from drgrpo.model import Objective, Policy, load_policy, max_positions, resolve_attention
from drgrpo.rollout import rollout, tokenize
from drgrpo.templates import get_template
from drgrpo.tokenizer import byte_tokenizer
from drgrpo.types import Batch, Rollout, UserError
from drgrpo.warmup import Warmup, cached_tiny_model

MAX_SKIPPED_IN_A_ROW = 3  # optimizer steps with a non-finite gradient


def main(config: Config) -> None:
    # ---- check everything that can be wrong before anything expensive
    resume_from = checkpoint.claim(config)
    template = get_template(config.template)
    problems = data.load_problems(config.train_data, problem_field=config.problem_field, answer_field=config.answer_field)
    eval_sources = [name.strip() for name in config.eval_data.split(",") if name.strip()]
    eval_sets = {name: data.load_problems(name) for name in eval_sources}

    # ---- setup: processes, log, tokenizer, prompts
    rank, world, device = distributed.start()
    transformers.utils.logging.disable_progress_bar()
    log = Log(config.out, active=rank == 0)
    dtype = getattr(torch, config.dtype)
    engine_name = resolve_engine(config.engine, device)
    log.say(f"config: {asdict(config)}")
    log.say(f"derived: {config.derived()}")

    tiny, warmup = config.model == "tiny", Warmup(seed=config.seed)
    tokenizer = byte_tokenizer() if tiny else AutoTokenizer.from_pretrained(config.model)
    positions = warmup.max_position_embeddings if tiny else max_positions(config.model)
    longest = min(config.max_prompt_tokens, positions - config.max_new_tokens)
    problems, dropped = tokenize(problems, template, tokenizer, longest)
    log.say(f"data: {len(problems)} training problems, {dropped} dropped for a prompt of more than {longest} tokens")
    eval_dropped = {}
    for name in eval_sets:
        eval_sets[name], eval_dropped[name] = tokenize(eval_sets[name], template, tokenizer, longest)
        log.say(f"data: {name}, {len(eval_sets[name])} problems, {eval_dropped[name]} too long (they count as wrong); "
                f"{len(data.overlap(problems, eval_sets[name]))} of them among the training problems")  # fmt: skip

    # ---- setup: policy, optimizer, sampler. The process group exists before vLLM does.
    model_path = config.model
    if tiny:
        with distributed.rank_zero_first():
            model_path = str(cached_tiny_model(warmup, config.cache_dir, log.say))
    policy = load_policy(model_path, dtype=dtype, device=device, attention=config.attention, kernel=config.kernel,
                         checkpoint_activations=config.checkpoint_activations)  # fmt: skip
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(config.beta1, config.beta2),
                                  weight_decay=config.weight_decay, fused=True)  # fmt: skip
    done = {"step": 0, "hours_used": 0.0}
    if resume_from:
        done = checkpoint.load(resume_from, policy, optimizer)
    if rank == 0:
        checkpoint.open_run(config, done["step"])
    engine = make_engine(engine_name, model_path, tokenizer, dtype=dtype, device=device, batch=config.sampler_batch,
                         max_tokens=longest + config.max_new_tokens, kv_cache_gb=config.kv_cache_gb)  # fmt: skip
    engine.sync(policy.named_weights(dtype))

    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, stop=template.stop,
                        stop_token_ids=stop_token_ids(model_path, tokenizer))  # fmt: skip
    objective = Objective(clip_low=config.clip_low, clip_high=config.clip_high, tis_cap=config.tis_cap or None,
                          temperature=config.temperature)  # fmt: skip
    kernel = config.kernel if config.kernel != "auto" else "triton" if device.type == "cuda" else "torch"
    attention = resolve_attention(config.attention, device, dtype)
    log.say(
        f"runs on: {world} x {device.type}, {config.dtype}; engine {engine.name}, attention {attention}, kernel {kernel}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {policy.lm.num_parameters():,} parameters"
    )

    # ---- loop
    def evaluate_all(step: int) -> None:
        ways = [Sampling(**asdict(sampling) | {"temperature": 0.0})] + [sampling] * bool(config.eval_samples)
        for name, eval_problems in eval_sets.items():
            for way in ways:
                samples = 1 if way.temperature == 0 else config.eval_samples
                scored = evaluate(engine, tokenizer, grader, eval_problems, samples, way, config.seed, step)
                row = {"step": step, "benchmark": name, **summarize(scored, eval_dropped[name]), "samples": samples,
                       "temperature": way.temperature, "max_new_tokens": way.max_new_tokens,
                       "template": config.template}  # fmt: skip
                log.record("eval", row)
                log.evaluation(row)

    if done["step"] >= config.steps:
        log.say(f"{config.out} is complete at step {done['step']}: raise --steps to train on, or choose another --out")
    elif done["step"]:
        log.say(f"resumed from {resume_from} after step {done['step']}")
    hours_before, started, skipped_in_a_row = done["hours_used"], time.perf_counter(), 0

    with Grader(template.answer) as grader, log.steps(done["step"] + 1, config.steps) as steps:
        if done["step"] == 0:
            evaluate_all(step=0)
        for step in steps:
            watch = Stopwatch()

            with watch("rollout"):  # each process samples its share of the prompts, with the weights of the last sync
                prompts = distributed.share(data.step_problems(problems, step, config.prompts_per_step, config.seed))
                mine = rollout(engine, tokenizer, prompts, config.group_size, sampling, config.seed, step)
            with watch("grade"):  # a truncated response earns nothing, whatever it says
                grades = grader([r.text for r in mine], [r.problem.answer for r in mine])
                rewards = [g.score * r.completion.finished for g, r in zip(grades, mine, strict=True)]

            with watch("pack"):
                groups = [slice(i, i + config.group_size) for i in range(0, len(mine), config.group_size)]
                shared = distributed.gather([(mine[g], rewards[g]) for g in groups])
                rollouts = [r for group, _ in shared for r in group]
                reward_PG = torch.tensor([rewards for _, rewards in shared])
                advantage_PG = group_advantage(reward_PG, config.algo)
                engine.sleep()
                updates = plan_updates(config, rollouts, advantage_PG, step, rank, world, device)

            stats = []
            with watch("train"):
                if config.old_logprob == "recompute":
                    updates = [[(b, recompute_logprob(policy, b, objective)) for b, _ in update] for update in updates]
                for i, update in enumerate(updates):
                    lr = warm_lr(config, (step - 1) * config.minibatches + i)
                    stats.append(train_minibatch(config, policy, optimizer, update, objective, lr, check_parity=i == 0))
                    skipped_in_a_row = 0 if stats[-1]["finite"] else skipped_in_a_row + 1
                    if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                        raise FloatingPointError(
                            f"{skipped_in_a_row} optimizer steps in a row had a non-finite gradient norm; the last checkpoint "
                            "is unharmed: resume from it with a lower --lr, or look at the responses in samples.jsonl"
                        )
            with watch("sync"):  # new weights -> sampler: from here on it draws from the updated policy
                engine.wake()
                engine.sync(policy.named_weights(dtype))

            last = step == config.steps
            with watch("eval"):
                if last or (config.eval_every and step % config.eval_every == 0):
                    evaluate_all(step)
            hours_used = hours_before + (time.perf_counter() - started) / 3600
            with watch("save"):
                if last or (config.save_every and step % config.save_every == 0):
                    checkpoint.save(config, step, policy, optimizer, tokenizer, dtype, hours_used)
            row = step_row(config, step, rollouts, reward_PG, advantage_PG, stats, watch.read(), hours_used)
            log.record("metrics", row)
            log.record("samples", *sample_rows(config, step, rollouts, reward_PG))
            log.step(row, config.steps, config.budget_hours)

    # ---- what came of it
    probe = rollout(engine, tokenizer, distributed.share(problems[: 8 * world]), 4, sampling, config.seed, config.steps + 1)
    packed = pack.pack([(r.problem.prompt_ids, r.completion.token_ids, r.completion.logprobs, 0.0) for r in probe], device)
    gap_sum, gap_max, tokens = parity.difference(recompute_logprob(policy, packed, objective), packed.sampler_logprob_N)
    log.say(f"after the last sync: |trainer - sampler| is {gap_sum / tokens:.1e} nats on average, {gap_max:.1e} at most, "
            f"over {tokens} tokens")  # fmt: skip
    parity.check(gap_sum / tokens, gap_max, dtype, config.parity_mean, config.parity_max)
    if rank == 0:
        from drgrpo.plot import plot

        log.table(read_jsonl(log.out / "eval.jsonl"), f"{config.out}: {config.algo}, {config.recipe}, seed {config.seed}")
        figures = plot([config.out])
        log.say(f"wrote {log.out}/metrics.jsonl, samples.jsonl, eval.jsonl, {', '.join(f.name for f in figures)} in plots/, "
                f"and {log.out}/hf for transformers, vLLM and eval.py")  # fmt: skip
    dist.barrier()
    engine.close()


def plan_updates(config: Config, rollouts: list[Rollout], advantage_PG: torch.Tensor, step: int, rank: int, world: int,
                 device: torch.device):  # fmt: skip
    """This process's packed micro-batches of every optimizer step: [minibatches][micro-batches] of (Batch, old log-probs).

    Who belongs to which optimizer step is drawn first. Then responses without advantage are dropped: their gradient is
    exactly zero and the normalizer does not count them, so this changes time and memory only."""
    advantage_B = advantage_PG.flatten().tolist()
    updates = []
    for chosen in pack.minibatches(len(rollouts), config.minibatches, config.seed, step):
        weights = token_weight(torch.tensor([rollouts[i].length for i in chosen]), config.algo, config.max_new_tokens)
        weight = dict(zip(chosen, weights.tolist(), strict=True))
        kept = [i for i in chosen if advantage_B[i] != 0 or not config.drop_zero_advantage]
        lengths = {i: len(rollouts[i].problem.prompt_ids) + rollouts[i].length for i in kept}
        plan = pack.microbatches(lengths, world, config.tokens_per_microbatch)[rank]
        batches = [
            pack.pack([(rollouts[i].problem.prompt_ids, rollouts[i].completion.token_ids, rollouts[i].completion.logprobs,
                        advantage_B[i] * weight[i]) for i in indices], device)
            for indices in plan
        ]  # fmt: skip
        updates.append([(b, b.sampler_logprob_N if config.old_logprob == "sampler" else None) for b in batches])
    return updates


@torch.no_grad()
def recompute_logprob(policy: Policy, batch: Batch, objective: Objective) -> torch.Tensor:
    """Log-probs of the responses under the policy as it is before this step's updates: the paper's old policy."""
    return policy(batch, objective)[0]


def train_minibatch(config: Config, policy: Policy, optimizer: torch.optim.Optimizer, update, objective: Objective,
                    lr: float, check_parity: bool) -> dict:  # fmt: skip
    """One optimizer step over this minibatch's micro-batches; returns what happened, summed over all processes."""
    # Dr. GRPO (2/2): constant normalizer, not response length. FSDP2 averages gradients over processes: undo it.
    scale = dist.get_world_size() / (config.minibatch_size * config.max_new_tokens)
    sums, peaks = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch, old_logprob_N in update:
        loss, stats = policy(batch, objective, old_logprob_N, scale)
        loss.backward()
        gap_sum, gap_max, tokens = parity.difference(stats["logprob"], batch.sampler_logprob_N)
        ratio_max = stats["log_ratio"].max().exp().item() if tokens else 0.0
        sums += torch.tensor([tokens, gap_sum, (stats["clipped"] != 0).sum().item(), loss.item() / dist.get_world_size()])
        peaks = torch.maximum(peaks, torch.tensor([gap_max, ratio_max], dtype=torch.float64))
    dist.all_reduce(sums)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    (tokens, gap_sum, clipped, loss), (gap_max, ratio_max) = sums.tolist(), peaks.tolist()
    if check_parity and tokens:  # still before the first update: the sampler held these weights
        parity.check(gap_sum / tokens, gap_max, getattr(torch, config.dtype), config.parity_mean, config.parity_max)

    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    grad_norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
    if math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return {"tokens": tokens, "gap_sum": gap_sum, "gap_max": gap_max, "clipped": clipped, "ratio_max": ratio_max,
            "loss": loss, "grad_norm": grad_norm, "finite": math.isfinite(grad_norm), "lr": lr}  # fmt: skip


def warm_lr(config: Config, update: int) -> float:
    """Constant, after a linear warm-up over the first `warmup_steps` optimizer steps (the paper has none)."""
    return config.lr * min(1.0, (update + 1) / config.warmup_steps) if config.warmup_steps else config.lr


def step_row(config: Config, step: int, rollouts: list[Rollout], reward_PG, advantage_PG, stats: list[dict],
             seconds: dict, hours_used: float) -> dict:  # fmt: skip
    """One line of metrics.jsonl. Statistics of responses cover all of them, those of the update the ones trained on."""
    reward_B = reward_PG.flatten().tolist()
    length = [r.length for r in rollouts]
    trained, first, tokens = sum(s["tokens"] for s in stats), stats[0], sum(length)
    finite = [s["grad_norm"] for s in stats if s["finite"]]
    return {
        "step": step,
        "algo": config.algo,
        "reward_mean": fmean(reward_B),
        "response_len_mean": fmean(length),
        "response_len_correct": mean([n for n, r in zip(length, reward_B, strict=True) if r > 0]),
        "response_len_incorrect": mean([n for n, r in zip(length, reward_B, strict=True) if r <= 0]),
        "truncated_frac": fmean(not r.completion.finished for r in rollouts),
        "zero_adv_frac": (advantage_PG == 0).float().mean().item(),
        "entropy": -sum(sum(r.completion.logprobs) for r in rollouts) / tokens,
        "clip_frac": sum(s["clipped"] for s in stats) / trained if trained else None,
        "ratio_max": max(s["ratio_max"] for s in stats) if trained else None,
        "loss": fmean(s["loss"] for s in stats) if finite else None,
        "grad_norm": mean(finite),
        "skipped_updates": len(stats) - len(finite),
        "lr": stats[-1]["lr"],
        "parity_mean": first["gap_sum"] / first["tokens"] if first["tokens"] else None,
        "parity_max": first["gap_max"] if first["tokens"] else None,
        "tokens": tokens,
        "tokens_trained": int(trained),
        "tokens_per_s": tokens / seconds["total"],
        "seconds": {phase: round(s, 4) for phase, s in seconds.items()},
        "hours_used": hours_used,
    }


def sample_rows(config: Config, step: int, rollouts: list[Rollout], reward_PG) -> list[dict]:
    """The first samples of a step for samples.jsonl, one of each of the first prompts."""
    chosen = range(0, len(rollouts), config.group_size)[: config.samples_logged]
    return [
        {"step": step, "problem": r.problem.question, "answer": r.problem.answer, "response": r.text, "reward": reward,
         "tokens": r.length, "finished": r.completion.finished}
        for r, reward in ((rollouts[i], reward_PG.flatten()[i].item()) for i in chosen)
    ]  # fmt: skip


def cli(argv: list[str] | None = None) -> None:
    try:
        main(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    cli()
