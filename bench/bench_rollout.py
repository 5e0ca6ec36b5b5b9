"""Rollout and weight sync at the size of a real model, and whether the sampler's log-probs are the
trainer's.

    python -m bench.bench_rollout --device cuda                # 1.5B, random weights; both engines, where vLLM is installed
    python -m bench.bench_rollout --rehearse                   # the same on a CPU with the tiny model
    python -m bench.bench_rollout --rehearse --engines vllm

Per engine: seconds to build it, to sync the trainer's weights, and to sample a batch that drains as
responses end (which they do by a made-up set of stop tokens, as random weights have no sense of an
end); tokens/s, the share of the time in which fewer than 16 sequences were left, and tokens/s of a
batch whose responses all have one length. Then the trainer's weights move and its log-probs of
fresh samples are compared with the sampler's, before the sync, for scale, and after it; vLLM also
sleeps at level 2, gives its memory back, wakes, takes the weights and is compared once more. Exit
status 1 if a sync does not shrink the difference tenfold. Whether the gate of drgrpo/parity.py
would pass it is reported only: bfloat16 errors grow through a deep network of random weights more
than through a trained one. The PyTorch engine is there for parity, not for speed. Writes
DIR/rollout.json after every stage; the last line printed is that JSON.
"""

import argparse
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import train
from bench.bench_step import SHAPES
from bench.harness import ROOT, provenance, write_json
from drgrpo import distributed, pack, parity
from drgrpo.engine import make_engine
from drgrpo.model import Objective, Policy, load_policy
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, build_tiny_model
from drgrpo.types import Completion, Request, Sampling

SIZES = {  # engine: (responses, token budget) on a GPU
    "torch": (64, 96),
    "vllm": (512, 1024),
}
PROMPT, TAIL = 120, 16
SECONDS = {"vllm": 60.0}  # what building it takes at least: it is not begun with less


def build_model(shape: str, device: torch.device, folder: str) -> None:
    """Random bfloat16 weights from one seed, on disk. Blocks add more to the residual stream than
    the embedding brings, else a tied head would repeat its input; and the last norm gives logits
    the spread at which the entropy is a few nats, where transformers' own scale leaves every token
    about as likely as any other."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **SHAPES[shape], max_position_embeddings=4096, eos_token_id=None, bos_token_id=None
    )
    config.initializer_range = config.hidden_size**-0.5
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        lm.base_model.norm.weight.mul_(math.sqrt(2 * math.log(config.vocab_size)))
    lm.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_requests(count: int, prompt: int, vocabulary: int, step: int) -> list[Request]:
    """Groups of 8 to a prompt, as in training."""
    generator = torch.Generator().manual_seed(step)
    prompts = torch.randint(vocabulary, (count // 8, prompt), generator=generator).tolist()
    return [Request(prompts[i // 8], seed=1000 * step + i) for i in range(count)]


def make_sampling(budget: int, vocabulary: int) -> Sampling:
    """A token in so many ends a response that they are about a third of the budget long."""
    return Sampling(
        max_new_tokens=budget, stop_token_ids=tuple(range(0, vocabulary, max(2, budget // 3)))
    )


def sample(engine, requests: list[Request], sampling: Sampling) -> tuple[list[Completion], dict]:
    """The responses, and how long the batch took to drain."""
    start, ended = time.perf_counter(), []
    completions = engine.generate(
        requests, sampling, lambda i, c: ended.append(time.perf_counter() - start)
    )
    tokens, seconds = sum(len(c.token_ids) for c in completions), time.perf_counter() - start
    tail = seconds - ended[-TAIL] if len(ended) > TAIL else seconds
    return completions, {
        "responses": len(requests),
        "tokens": tokens,
        "longest": max(len(c.token_ids) for c in completions),
        "rollout_s": seconds,
        "tokens_per_s": tokens / seconds,
        "tail_share": tail / seconds,
    }


def steady(engine, sequences: int, length: int, prompt: int, vocabulary: int) -> dict:
    """The same with responses of one length, nothing draining."""
    how = Sampling(max_new_tokens=length, stop_token_ids=())
    found = sample(engine, make_requests(sequences, prompt, vocabulary, 4), how)[1]
    return {
        "sequences": sequences,
        "prompt": prompt,
        "length": length,
        "tokens_per_s": found["tokens_per_s"],
    }


def gaps(
    policy: Policy,
    requests: list[Request],
    completions: list[Completion],
    dtype: torch.dtype,
    device: torch.device,
) -> dict:
    """|trainer - sampler| over all response tokens, in nats, and whether the gate would let them
    pass."""
    gap_N = []
    sequences = [
        (r.prompt_ids, c.token_ids, c.logprobs, 0.0)
        for r, c in zip(requests, completions, strict=True)
    ]
    for i in range(0, len(sequences), 16):
        batch = pack.pack(sequences[i : i + 16], device)
        gap_N.append((train.logprob(policy, batch, Objective()) - batch.sampler_logprob_N).abs())
    gap_N = torch.cat(gap_N).double()
    mean, largest = gap_N.mean().item(), gap_N.max().item()
    limits = parity.LIMITS[dtype]
    return {
        "gap_mean": mean,
        "gap_p999": gap_N.quantile(0.999).item(),
        "gap_max": largest,
        "gap_limits": limits,
        "gate_passes": mean <= limits[0] and largest <= limits[1],
    }


@contextmanager
def timed(row: dict, key: str, device: torch.device):
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    row[key] = time.perf_counter() - start


def move(policy: Policy) -> None:
    """Every weight, by noise of a tenth of its size: a sampler that missed the sync would show."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p))


def measure(
    name: str,
    folder: str,
    policy: Policy,
    dtype: torch.dtype,
    device: torch.device,
    size: tuple[int, int, int],
    row: dict,
    save: Callable[[], object],
) -> None:
    """Fills the row of one engine, stage by stage."""
    count, budget, prompt = size
    vocabulary, sleeps = policy.lm.config.vocab_size, name == "vllm" and device.type == "cuda"
    sampling = make_sampling(budget, vocabulary)
    with timed(row, "build_s", device):
        engine = make_engine(
            name,
            folder,
            byte_tokenizer(),
            dtype=dtype,
            device=device,
            batch=256,
            max_tokens=prompt + budget,
            kv_cache_gb=8.0 if device.type == "cuda" else 0.05,
            sleep=sleeps,
        )
    with timed(row, "first_sync_s", device):
        engine.sync(policy.named_weights(dtype))
    save()
    engine.generate(
        make_requests(8, prompt, vocabulary, 1), make_sampling(8, vocabulary)
    )  # warms up
    row |= sample(engine, make_requests(count, prompt, vocabulary, 2), sampling)[1]
    row["steady"] = steady(engine, min(count, 256), budget // 4, prompt, vocabulary)
    save()
    fresh = make_requests(min(count, 64), prompt, vocabulary, 3)
    move(policy)
    row["stale_gap_mean"] = gaps(policy, fresh, sample(engine, fresh, sampling)[0], dtype, device)[
        "gap_mean"
    ]
    with timed(row, "sync_s", device):
        engine.sync(policy.named_weights(dtype))
    row |= gaps(policy, fresh, sample(engine, fresh, sampling)[0], dtype, device)
    save()
    if sleeps:
        row["after_sleep"] = slept = {}
        free = torch.cuda.mem_get_info()[0]
        with timed(slept, "sleep_s", device):
            engine.sleep()
        slept["freed_gb"] = (torch.cuda.mem_get_info()[0] - free) / 1e9
        move(policy)
        with timed(slept, "wake_and_sync_s", device):
            engine.wake()
            engine.sync(policy.named_weights(dtype))
        slept |= gaps(policy, fresh, sample(engine, fresh, sampling)[0], dtype, device)
        save()
    engine.close()


def why_not(name: str, engines: list[str] | None, rehearse: bool, left: float) -> str | None:
    if engines is not None:
        return None if name in engines else "not asked for"
    if name == "vllm" and rehearse:
        return "not rehearsed, as it takes half a minute to start; --engines vllm does"
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return None if left > SECONDS.get(name, 0.0) else f"not reached: {left:.0f} s left"


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--shape", choices=[name for name in SHAPES if name != "toy"], default="1.5b"
    )
    parser.add_argument("--engines", nargs="+", choices=list(SIZES))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no engine that could not end in time"
    )
    parser.add_argument("--rehearse", action="store_true", help="the tiny model, on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    args = parser.parse_args()
    if args.device == "cpu" and not args.rehearse:
        parser.error("a model of that size on a CPU would take hours: --rehearse, or --device cuda")
    _, _, device = distributed.start()
    dtype = torch.float32 if args.rehearse else torch.bfloat16
    shape = "tiny" if args.rehearse else args.shape
    report = {"where": provenance(args.device), "shape": shape, "dtype": str(dtype), "engines": {}}

    def save() -> str:
        return write_json(args.out / "rollout.json", report)

    with tempfile.TemporaryDirectory() as folder:
        if args.rehearse:
            build_tiny_model(Warmup(), folder)
        else:
            build_model(args.shape, device, folder)
        policy = load_policy(folder, dtype=dtype, device=device)
        for name, (
            count,
            budget,
        ) in SIZES.items():  # vLLM last: when it ends, it takes the process group with it
            row = report["engines"][name] = {}
            if reason := why_not(
                name, args.engines, args.rehearse, args.seconds - (time.monotonic() - started)
            ):
                row["skipped"] = reason
            else:
                size = (16, 24, 20) if args.rehearse else (count, budget, PROMPT)
                measure(name, folder, policy, dtype, device, size, row, save)
            print(f"{name}: {row}", flush=True)
    distributed.stop()
    print(save())
    for name, row in report["engines"].items():
        for found in (row, row.get("after_sleep", {})):
            if not found.get("gap_mean", 0.0) <= row.get("stale_gap_mean", 0.0) / 10:
                raise SystemExit(f"{name} does not have the trainer's weights after a sync: {row}")


if __name__ == "__main__":
    main()
