"""How fast are rollout and weight sync at the size of a real model, and are the sampler's log-probs
the trainer's?

    python -m bench.bench_rollout --device cuda                # 1.5B, random weights, both engines
    python -m bench.bench_rollout --rehearse                   # the same on a CPU, the tiny model
    python -m bench.bench_rollout --rehearse --engines vllm

Seconds to build each engine, to sync the trainer's weights, and to sample a batch that drains as
responses end. A made-up set of stop tokens ends them, as random weights have no sense of an end.
tokens/s comes with the share of the time in which fewer than 16 sequences ran, and with tokens/s of
a batch whose responses all have one length.

Then the trainer's weights move. Its log-probs of fresh samples are compared with the sampler's
before the sync, for scale, and after it. vLLM also sleeps at level 2, gives its memory back, wakes,
takes the weights and is compared once more. Exit status 1 if a sync does not shrink the difference
tenfold. Whether the gate of drgrpo/parity.py would let it pass is reported only, because bfloat16
errors grow more through a deep network of random weights than through a trained one. The PyTorch
engine is there for parity, not for speed. DIR/rollout.json is written after every stage, and it is
the last line printed.
"""

import argparse
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from bench.harness import RESULTS, command_line, provenance, write_json
from bench.shapes import SHAPES, model_config
from drgrpo import distributed, pack, parity
from drgrpo.engine import make_engine
from drgrpo.model import Objective, Policy, load_policy
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, build_tiny_model
from drgrpo.types import Completion, Request, Sampling

SIZES = {"torch": (64, 96), "vllm": (512, 1024)}
"""(responses, token budget) of each engine on a GPU. vLLM is last: when it ends, it takes the
process group with it."""
PROMPT, TAIL = 120, 16
SECONDS = {"vllm": 60.0}
"""What building an engine takes at least. It is not begun with less."""


def build_model(shape: str, device: torch.device, folder: str) -> None:
    """Random bfloat16 weights from one seed, on disk. Blocks add more to the residual stream than
    the embedding brings, else a tied head would repeat its input. The last norm gives logits the
    spread at which the entropy is a few nats. At transformers' own scale every token is about as
    likely as any other."""
    torch.manual_seed(0)
    no_ends = {"eos_token_id": None, "bos_token_id": None}
    config = model_config(SHAPES[shape], max_position_embeddings=4096, **no_ends)
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
    stop = tuple(range(0, vocabulary, max(2, budget // 3)))
    return Sampling(max_new_tokens=budget, stop_token_ids=stop)


def sample(engine, requests: list[Request], sampling: Sampling) -> tuple[list[Completion], dict]:
    """The responses, and how long the batch took to drain."""
    start, ends = time.perf_counter(), []
    completions = engine.generate(
        requests, sampling, lambda i, c: ends.append(time.perf_counter() - start)
    )
    seconds, lengths = time.perf_counter() - start, [len(c.token_ids) for c in completions]
    tail = seconds - ends[-TAIL] if len(ends) > TAIL else seconds
    speed = dict(rollout_s=seconds, tokens_per_s=sum(lengths) / seconds, tail_share=tail / seconds)
    size = dict(responses=len(requests), tokens=sum(lengths), longest=max(lengths))
    return completions, size | speed


def steady(engine, sequences: int, length: int, prompt: int, vocabulary: int) -> dict:
    """The same with responses of one length, nothing draining."""
    sampling = Sampling(max_new_tokens=length, stop_token_ids=())
    speed = sample(engine, make_requests(sequences, prompt, vocabulary, 4), sampling)[1]
    job = {"sequences": sequences, "prompt": prompt, "length": length}
    return job | {"tokens_per_s": speed["tokens_per_s"]}


def gaps(policy: Policy, requests: list, completions: list, dtype, device) -> dict:
    """|trainer - sampler| over all response tokens, in nats, and whether the gate would let them
    pass."""
    parts = []
    for r, c in zip(requests, completions, strict=True):
        batch = pack.pack([pack.Sequence(r.prompt_ids, c.token_ids, c.logprobs, 0.0)], device)
        parts.append((policy.logprob(batch) - batch.sampler_logprob_N).abs())
    gap_N, limits = torch.cat(parts).double(), parity.LIMITS[dtype]
    mean, largest, p999 = gap_N.mean().item(), gap_N.max().item(), gap_N.quantile(0.999).item()
    passes = mean <= limits[0] and largest <= limits[1]
    gate = {"gap_limits": limits, "gate_passes": passes}
    return {"gap_mean": mean, "gap_p999": p999, "gap_max": largest, **gate}


@contextmanager
def timed(row: dict, key: str, device: torch.device) -> Iterator[None]:
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
    name: str, folder: str, policy: Policy, dtype, device, size, row: dict, save: Callable
) -> None:
    """Fills the row of one engine, stage by stage. `size`: responses, their budget, prompt
    tokens."""
    count, budget, prompt = size
    vocabulary, sleeps = policy.lm.config.vocab_size, name == "vllm" and device.type == "cuda"
    sampling = make_sampling(budget, vocabulary)
    fresh = make_requests(min(count, 64), prompt, vocabulary, 3)

    def compare() -> dict:
        return gaps(policy, fresh, sample(engine, fresh, sampling)[0], dtype, device)

    with timed(row, "build_s", device):
        type_name = str(dtype).removeprefix("torch.")
        choice = SimpleNamespace(
            engine=name, dtype=type_name, sampler_batch=256, tp=1, batch_invariant=False
        )
        room = prompt + budget, 8.0 if device.type == "cuda" else 0.05
        engine = make_engine(choice, folder, byte_tokenizer(), device, *room, sleeps)
    with timed(row, "first_sync_s", device):
        engine.sync(policy.named_weights(dtype))
    save()
    warm_up = make_requests(8, prompt, vocabulary, 1)
    engine.generate(warm_up, make_sampling(8, vocabulary))
    row |= sample(engine, make_requests(count, prompt, vocabulary, 2), sampling)[1]
    row["steady"] = steady(engine, min(count, 256), budget // 4, prompt, vocabulary)
    save()
    move(policy)
    row["stale_gap_mean"] = compare()["gap_mean"]
    with timed(row, "sync_s", device):
        engine.sync(policy.named_weights(dtype))
    row |= compare()
    save()
    if sleeps:
        row["after_sleep"] = slept = {}
        free = torch.cuda.mem_get_info()[0]
        with timed(slept, "sleep_s", device):
            engine.sleep()
        slept["freed_gb"] = (torch.cuda.mem_get_info()[0] - free) / 1e9
        move(policy)
        with timed(slept, "wake_and_sync_s", device):
            engine.sync(policy.named_weights(dtype))
        slept |= compare()
        save()
    engine.close()


def why_not(name: str, engines: list[str] | None, rehearse: bool, rest: float) -> str | None:
    """Why this engine is not measured, with `rest` seconds to go."""
    if engines is not None:
        return None if name in engines else "not asked for"
    if name == "vllm" and rehearse:
        return "not rehearsed, as it takes half a minute to start; --engines vllm does"
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return None if rest > SECONDS.get(name, 0.0) else f"not reached: {rest:.0f} s left"


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default=default)
    add("--shape", choices=SHAPES, default="1.5b")
    add("--engines", nargs="+", choices=SIZES)
    add("--seconds", type=float, default=math.inf, help="begin no engine that would end later")
    add("--rehearse", action="store_true", help="the tiny model, on a CPU")
    add("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    if args.device == "cpu" and not args.rehearse:
        parser.error("a model of that size on a CPU would take hours: --rehearse, or --device cuda")
    return args


def main() -> None:
    started, args = time.monotonic(), parse()
    _, _, device = distributed.start()
    dtype = torch.float32 if args.rehearse else torch.bfloat16
    shape, engines = "tiny" if args.rehearse else args.shape, {}
    where = provenance(args.device)
    report = {"where": where, "shape": shape, "dtype": str(dtype), "engines": engines}

    def save() -> str:
        return write_json(args.out / "rollout.json", report)

    with tempfile.TemporaryDirectory() as folder:
        if args.rehearse:
            build_tiny_model(Warmup(), folder)
        else:
            build_model(args.shape, device, folder)
        policy = load_policy(folder, Objective(), dtype=dtype, device=device)
        for name, (count, budget) in SIZES.items():
            row = engines[name] = {}
            rest = args.seconds - (time.monotonic() - started)
            size = (16, 24, 20) if args.rehearse else (count, budget, PROMPT)
            if reason := why_not(name, args.engines, args.rehearse, rest):
                row["skipped"] = reason
            else:
                measure(name, folder, policy, dtype, device, size, row, save)
            print(f"{name}: {row}", flush=True)
    distributed.stop()
    print(save())
    for name, row in engines.items():
        for stage in (row, row.get("after_sleep", {})):
            if not stage.get("gap_mean", 0.0) <= row.get("stale_gap_mean", 0.0) / 10:
                raise SystemExit(f"{name} does not have the trainer's weights after a sync: {row}")


if __name__ == "__main__":
    main()
