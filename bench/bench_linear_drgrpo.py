"""How fast is the fused head, in how much memory, and how exact, next to what else computes the
same gradients?

    python -m bench.bench_linear_drgrpo                                  on a GPU: both models, four token counts
    python -m bench.bench_linear_drgrpo --models 7B --tokens 16384       one shape
    python -m bench.bench_linear_drgrpo --sweep                          also which block and chunk sizes are fastest here
    python -m bench.bench_linear_drgrpo --device cpu                     the torch backend at small sizes

Every contender gets the same hidden states, weight, targets and an advantage of 1, strictly
on-policy: there the gradient of Dr. GRPO is that of the mean cross-entropy, so the cross-entropy
kernels compete on equal terms. The denominator is the bare GEMMs. Entropies are realistic (targets
are sampled from the softmax); zeros would run at higher clocks.

First the fused head must be as exact as plain autograd, or nothing is timed. Then, per shape:
milliseconds (p20, p50, p80) of forward and backward and of log-probs alone, peak memory beyond the
inputs, relative error of both gradients against float64 on the first tokens, host syncs. What is
not installed, or does not run on this machine, is listed with the reason. Writes OUT.json, anew
after every shape, and OUT.png; the last line of stdout is JSON.

The sweep times forward and backward at the first token count with other sizes of a row program,
then, with the fastest of those, other chunks. Its winner is what kernels/linear_drgrpo.py should
say in TUNED for such a card.
"""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import (
    ROOT,
    host_syncs,
    interleaved,
    peak_memory,
    provenance,
    quantiles,
    table,
    write_json,
)
from drgrpo.kernels import linear_drgrpo as head

MODELS = {
    "7B": (3584, 152_064),  # Qwen2.5
    "1.5B": (1536, 151_936),
    "tiny": (64, 260),
    "small": (256, 8192),
}
DEFAULTS = {
    "cuda": (["7B", "1.5B"], [2048, 4096, 16_384, 65_536]),
    "cpu": (["tiny", "small"], [1024, 4096]),
}
ERROR_TOKENS = 256
# what a sweep tries: (BLOCK_V, NUM_WARPS) that fit the registers, and tokens of a chunk at the
# widest vocabulary
PROGRAMS = {
    "cuda": [(4096, 8), (4096, 16), (8192, 16), (8192, 32), (16_384, 32)],
    "cpu": [],
}  # the torch backend has none
CHUNKS = {"cuda": [2048, 3072, 4096, 6144, 8192], "cpu": [128, 256]}
NOISE = 0.01  # a gain of a smaller share is none


class Skip(Exception):
    """Why a contender does not take part."""


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [T]
    advantage: Tensor  # [T], ones

    def backward(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """(dhidden, dweight) of a loss."""
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def first(self, tokens: int) -> "Case":
        hidden = self.hidden[:tokens].detach().requires_grad_()
        return replace(
            self, hidden=hidden, target=self.target[:tokens], advantage=self.advantage[:tokens]
        )


@dataclass(frozen=True)
class Contender:
    """What it computes on a case: `step` the gradients of the loss, `logprob` the log-probs, where
    it can."""

    step: Callable[[], tuple[Tensor, Tensor]]
    logprob: Callable[[], Tensor] | None = None


def make_case(T: int, D: int, V: int, device: str) -> Case:
    """Hidden states of a final norm, a weight that gives entropies of about one nat, targets
    sampled by the Gumbel trick in pieces, because [T, V] may not fit."""
    rng = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(T, D, generator=rng, device=device).to(dtype)
    weight = (
        torch.randn(V, D, generator=rng, device=device)
        * (math.sqrt(2 * math.log(V)) / math.sqrt(D))
    ).to(dtype)
    target = torch.empty(T, dtype=torch.int64, device=device)
    for start in range(0, T, 512):
        logits = (hidden[start : start + 512] @ weight.T).float()
        target[start : start + 512] = (
            logits + torch.empty_like(logits).exponential_(generator=rng).log_().neg_()
        ).argmax(-1)
    return Case(
        hidden.requires_grad_(), weight.requires_grad_(), target, torch.ones(T, device=device)
    )


# ---- contenders: each takes a case and returns a Contender, or raises Skip or ImportError


def ours(logits_dtype):
    def build(case):
        how = dict(logits_dtype=logits_dtype or case.hidden.dtype)
        scale = 1 / len(case.target)

        def step():
            return case.backward(
                head.linear_drgrpo_loss(
                    case.hidden, case.weight, case.target, case.advantage, scale=scale, **how
                )[0]
            )

        return Contender(
            step, lambda: head.linear_logprob(case.hidden, case.weight, case.target, **how)[0]
        )

    return build


def ours_fp32_logits(case):
    if case.hidden.dtype == torch.float32:
        raise Skip("the same as fused: the inputs are fp32")
    return ours(torch.float32)(case)


def gemms(case):
    """The floor: three matrix products and nothing else. Its results are no gradients."""
    x, w = case.hidden.detach(), case.weight.detach()

    def step():
        z = x @ w.T
        return z @ w, z.T @ x

    return Contender(step, lambda: x @ w.T)


def gemms_chunked(case):
    """The same products in the fused head's chunks, with dW accumulated in fp32."""
    x, w = case.hidden.detach(), case.weight.detach()
    chunk = head._chunk(len(x), len(w), x.device)

    def step():
        z = x.new_empty(min(chunk, len(x)), len(w))
        dx, dw = torch.empty_like(x), w.new_empty(w.shape, dtype=torch.float32)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            n = len(x[part])
            head._matmul(x[part], w.T, z[:n])
            head._matmul(z[:n], w, dx[part])
            head._matmul(z[:n].T, x[part], dw, accumulate=start > 0)
        return dx, dw

    return Contender(step)


def policy_loss(logprob, advantage):
    """Dr. GRPO on-policy, from log-probs."""
    return -((logprob - logprob.detach()).exp() * advantage).mean()


def naive_logprob(hidden, weight, target):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def naive(case, function=naive_logprob):
    """bf16 logits, upcast to fp32, log_softmax, gather, autograd."""

    def logprob():
        with torch.no_grad():
            return function(case.hidden, case.weight, case.target)

    def step():
        return case.backward(
            policy_loss(function(case.hidden, case.weight, case.target), case.advantage)
        )

    return Contender(step, logprob)


def compiled(case):
    return naive(case, torch.compile(naive_logprob))


def naive_cross_entropy(case):
    """F.cross_entropy on bf16 logits."""
    return Contender(
        lambda: case.backward(F.cross_entropy(case.hidden @ case.weight.T, case.target))
    )


def torch_linear_cross_entropy(case):
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return Contender(
        lambda: case.backward(
            F.linear_cross_entropy(case.hidden, case.weight, case.target, options=options)
        )
    )


def trl_full_logits(case):
    from trl.trainer.utils import selective_log_softmax

    return naive(
        case, lambda hidden, weight, target: selective_log_softmax(hidden @ weight.T, target)
    )


def trl_chunked(case):
    from trl.trainer import utils

    function, chunk = (
        utils._ChunkedLogProbFunction.apply,
        getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192),
    )
    return naive(
        case, lambda hidden, weight, target: function(hidden, weight, None, target, 1.0, chunk)[0]
    )


def in_sequences(case):
    """([B, L, D], [B, L], [B], L): Liger's losses take padded responses with one advantage each."""
    T, D = case.hidden.shape
    L = next(length for length in (1024, 512, 256, 1) if T % length == 0)
    return case.hidden.view(-1, L, D), case.target.view(-1, L), case.advantage[::L].contiguous(), L


def liger_grpo(case):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, target, advantage, L = in_sequences(case)
    function = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        loss_type="dr_grpo",
        max_completion_length=L,
        compiled=case.hidden.is_cuda,
    )
    mask = torch.ones_like(target)
    return Contender(
        lambda: case.backward(function(hidden, case.weight, target, mask, advantage)[0])
    )


def liger_triton_grpo(case):
    if not case.hidden.is_cuda:
        raise Skip("needs CUDA")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    hidden, target, advantage, L = in_sequences(case)

    def step():
        logits = (
            F.pad(hidden, (0, 0, 0, 1)) @ case.weight.T
        )  # it expects the logits after the last token too
        return case.backward(
            triton_grpo_loss(
                logits,
                None,
                None,
                target,
                advantage,
                temperature=1.0,
                beta=0.0,
                eps_low=0.2,
                eps_high=0.2,
                loss_type="dr_grpo",
                max_completion_length=L,
                reduce=True,
            )[0]
        )

    return Contender(step)


def liger_cross_entropy(case):
    if not case.hidden.is_cuda:
        raise Skip("needs CUDA")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return Contender(
        lambda: case.backward(
            LigerFusedLinearCrossEntropyFunction.apply(case.hidden, case.weight, case.target)[0]
        )
    )


def cce(**options):
    def build(case):
        if not case.hidden.is_cuda:
            raise Skip("needs CUDA")
        from cut_cross_entropy import linear_cross_entropy

        return Contender(
            lambda: case.backward(
                linear_cross_entropy(case.hidden, case.weight, case.target, **options)
            )
        )

    return build


def verl(case):
    if not case.hidden.is_cuda:
        raise Skip("needs CUDA")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return naive(
        case,
        lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, 1.0, "none")[0],
    )


def quack(case):
    if not case.hidden.is_cuda or torch.cuda.get_device_capability()[0] < 9:
        raise Skip("needs Hopper or newer")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Contender(
        lambda: case.backward(chunked_linear_cross_entropy(case.hidden, case.weight, case.target))
    )


FLOORS = ("3 bare GEMMs", "3 GEMMs in chunks, fp32 dW")
CONTENDERS = {
    "3 bare GEMMs": gemms,
    "3 GEMMs in chunks, fp32 dW": gemms_chunked,
    "fused (this repository)": ours(None),
    "fused, fp32 logits": ours_fp32_logits,
    "torch, fp32 upcast": naive,
    "torch, cross_entropy": naive_cross_entropy,
    "torch.compile": compiled,
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "TRL full logits": trl_full_logits,
    "TRL chunked": trl_chunked,
    "Liger fused GRPO": liger_grpo,
    "Liger triton_grpo_loss": liger_triton_grpo,
    "Liger fused CE": liger_cross_entropy,
    "CCE": cce(),
    "CCE, no filter": cce(filter_eps=None),
    "verl fused": verl,
    "quack": quack,
}


# ---- measuring


def exact(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, dhidden, dweight) in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    logprob = head.linear_logprob_ref(hidden, weight, case.target)[0]
    return logprob.detach(), *torch.autograd.grad(-logprob.mean(), (hidden, weight))


def distance(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


def errors(build, case: Case, truth) -> dict[str, float]:
    """Relative errors of the gradients; root mean square of the log-probs' in nats."""
    contender = build(case)
    dhidden, dweight = contender.step()
    found = {"dhidden": distance(dhidden, truth[1]), "dweight": distance(dweight, truth[2])}
    if contender.logprob is not None:
        found["logprob_rms"] = (
            (contender.logprob().double() - truth[0]).square().mean().sqrt().item()
        )
    return found


def check(case: Case) -> None:
    """The fused head's gradients are at most 1.1 times as far from float64 as plain autograd's
    (fp32: 1e-5)."""
    truth = exact(case)
    mine, theirs = errors(ours(None), case, truth), errors(naive, case, truth)
    slack = 1e-5 if case.hidden.dtype == torch.float32 else 1e-4
    for name in ("dhidden", "dweight", "logprob_rms"):
        if not mine[name] <= 1.1 * theirs[name] + slack:
            sys.exit(
                f"not timing a wrong kernel: {name} is off by {mine[name]:.2e}, plain autograd by {theirs[name]:.2e}"
            )


def measure(model: str, T: int, device: str, names: list[str], repeats: int) -> list[dict]:
    """One row per contender that runs at this shape, and one with a reason per contender that does
    not."""
    D, V = MODELS[model]
    case = make_case(T, D, V, device)
    small = case.first(min(ERROR_TOKENS, T))
    check(small)
    truth = exact(small)
    rows, running = [], {}
    for name in names:
        row = {"model": model, "T": T, "D": D, "V": V, "contender": name}
        rows.append(row)
        try:
            contender = CONTENDERS[name](case)
            contender.step()  # compiles, tunes, and shows whether it fits
            row["peak_bytes"] = peak_memory(contender.step, device)
            row["host_syncs"] = host_syncs(contender.step, device)
            if name not in FLOORS:
                row["errors"] = errors(CONTENDERS[name], small, truth)
            if contender.logprob is not None:
                contender.logprob()
                row["logprob_peak_bytes"] = peak_memory(contender.logprob, device)
            running[name] = contender
        except Skip as reason:
            row["skipped"] = str(reason)
        except ImportError as error:
            row["skipped"] = f"not installed: {error}"
        except (
            Exception
        ) as error:  # somebody else's code at a shape it may not support: reported, not fatal
            if name.startswith("fused"):
                raise
            row["skipped"] = (
                f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            )
    steps = interleaved({name: c.step for name, c in running.items()}, device, repeats)
    logprobs = interleaved(
        {name: c.logprob for name, c in running.items() if c.logprob}, device, repeats
    )
    for row in rows:
        for key, times in (("step_ms", steps), ("logprob_ms", logprobs)):
            if row["contender"] in times:
                row[key] = quantiles(times[row["contender"]])
    floor = {row["contender"]: row for row in rows}["3 bare GEMMs"]
    for row in rows:
        for key in ("step_ms", "logprob_ms"):
            if key in row and key in floor:
                row[key.replace("_ms", "_ratio")] = row[key]["p50"] / floor[key]["p50"]
    return rows


# ---- which sizes are fastest


@contextmanager
def sized(sizes: head.Sizes):
    """The fused head with these sizes, whatever is tuned for the card."""
    original, head._sizes = head._sizes, lambda device: sizes
    try:
        yield
    finally:
        head._sizes = original


def sweep(models: list[str], T: int, device: str, repeats: int) -> dict:
    """Forward and backward by sizes: those of the row program, then chunks with the fastest of
    those. A size's score is its time over the default's, averaged over the models."""
    cases = {model: make_case(T, *MODELS[model], device) for model in models}
    steps = {model: ours(None)(case).step for model, case in cases.items()}
    default, widest = head._sizes(torch.device(device)), max(MODELS[model][1] for model in models)

    def timed(candidates):
        def run(sizes, model):
            with sized(sizes):
                steps[model]()

        runs = {
            (s, m): lambda s=s, m=m: run(s, m)
            for s in dict.fromkeys([default, *candidates])
            for m in models
        }
        for once in runs.values():
            once()  # compiles
        times = {key: quantiles(ms) for key, ms in interleaved(runs, device, repeats).items()}
        score = {
            s: sum(times[s, m]["p50"] / times[default, m]["p50"] for m in models) / len(models)
            for s, _ in times
        }
        return score, [
            {**s._asdict(), "model": m, "step_ms": ms, "score": score[s]}
            for (s, m), ms in times.items()
        ]

    score, rows = timed(
        [default._replace(block_v=block, num_warps=warps) for block, warps in PROGRAMS[device]]
    )
    fastest = min(score, key=score.get)
    score, chunk_rows = timed(
        [fastest, *(fastest._replace(chunk_logits=tokens * widest) for tokens in CHUNKS[device])]
    )
    best = min(score, key=score.get)
    better = device == "cuda" and score[best] < 1 - NOISE
    return {
        "T": T,
        "rows": rows + chunk_rows,
        "default": default._asdict(),
        "best": best._asdict(),
        "gain": 1 - score[best],
        "tuned": f"{torch.cuda.get_device_capability()}: {best}" if better else None,
    }


def show_sweep(found: dict) -> None:
    print(f"\nforward and backward at T = {found['T']} by sizes; score: over the default's time")
    columns = {
        "model": lambda r: r["model"],
        "block": lambda r: str(r["block_v"]),
        "warps": lambda r: str(r["num_warps"]),
        "chunk logits": lambda r: str(r["chunk_logits"]),
        **{p: lambda r, p=p: number(r, "step_ms", p) for p in ("p20", "p50", "p80")},
        "score": lambda r: number(r, "score", form="{:.3f}"),
    }
    print(table(sorted(found["rows"], key=lambda r: (r["model"], r["score"])), columns))
    advice = f"TUNED should say {found['tuned']}" if found["tuned"] else "the default stays"
    print(f"best: {found['best']}, {found['gain']:.1%} faster; {advice}")


# ---- reporting


def number(row, *keys, form="{:.2f}", factor=1.0):
    for key in keys:
        if row is None or row.get(key) is None:
            return "-"
        row = row[key]
    return form.format(row * factor)


COLUMNS = {
    "contender": lambda r: r["contender"],
    "fwd+bwd ms": lambda r: number(r, "step_ms", "p50"),
    "p20": lambda r: number(r, "step_ms", "p20"),
    "p80": lambda r: number(r, "step_ms", "p80"),
    "/ GEMMs": lambda r: number(r, "step_ratio"),
    "logprob ms": lambda r: number(r, "logprob_ms", "p50"),
    "/ GEMM": lambda r: number(r, "logprob_ratio"),
    "peak GB": lambda r: number(r, "peak_bytes", form="{:.3f}", factor=1e-9),
    "err dX": lambda r: number(r, "errors", "dhidden", form="{:.1e}"),
    "err dW": lambda r: number(r, "errors", "dweight", form="{:.1e}"),
    "err logp": lambda r: number(r, "errors", "logprob_rms", form="{:.1e}"),
    "syncs": lambda r: number(r, "host_syncs", form="{:d}", factor=1),
}


def show(rows):
    r = rows[0]
    print(f"\n{r['model']}: T = {r['T']}, D = {r['D']}, V = {r['V']}")
    print(table([row for row in rows if "step_ms" in row], COLUMNS))
    for row in rows:
        if "skipped" in row:
            print(f"skipped {row['contender']}: {row['skipped']}")


def plot(rows, where, path):
    """Time over the bare GEMMs and memory, one column of panels per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted(
        {(r["model"], r["T"]) for r in rows}, key=lambda s: (list(MODELS).index(s[0]), s[1])
    )
    figure, axes = plt.subplots(
        2, len(shapes), figsize=(4.5 * len(shapes), 8), squeeze=False, layout="constrained"
    )
    for column, shape in enumerate(shapes):
        timed = [r for r in rows if (r["model"], r["T"]) == shape and "step_ms" in r]
        names = [r["contender"] for r in timed]
        colors = [
            "tab:blue" if n.startswith("fused") else "0.6" if n in FLOORS else "tab:orange"
            for n in names
        ]
        panels = (
            (axes[0][column], [r["step_ratio"] for r in timed], "time / 3 bare GEMMs"),
            (axes[1][column], [r["peak_bytes"] / 1e9 for r in timed], "peak memory (GB)"),
        )
        for axis, values, label in panels:
            axis.barh(names, values, color=colors)
            axis.bar_label(axis.containers[0], fmt="%.2f", padding=2, fontsize=7)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_xlabel(label)
            axis.tick_params(labelsize=7)
        axes[0][column].set_title(f"{shape[0]}, {shape[1]} tokens")
    figure.suptitle(
        f"LM head + Dr. GRPO loss, forward and backward: {where['device']}, torch {where['torch']}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument(
        "--only", nargs="+", choices=list(CONTENDERS), help="contenders beside the bare GEMMs"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--sweep", action="store_true", help="also time other block and chunk sizes"
    )
    parser.add_argument(
        "--out", type=Path, help="path without suffix; default bench/results/linear_drgrpo_<device>"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device; --device cpu runs the torch backend"
        )
    models, tokens = (
        args.models or DEFAULTS[args.device][0],
        args.tokens or DEFAULTS[args.device][1],
    )
    names = [
        name for name in CONTENDERS if not args.only or name in args.only or name == "3 bare GEMMs"
    ]
    where = provenance(args.device)
    print(" ".join(f"{key}={value}" for key, value in where.items()))
    out = (
        args.out
        or ROOT / f"bench/results/linear_drgrpo_{where['device'].split(',')[0].replace(' ', '-')}"
    )
    result = {"where": where, "repeats": args.repeats, "rows": []}
    rows = result["rows"]
    for model in models:
        for T in tokens:
            rows += measure(model, T, args.device, names, args.repeats)
            show(rows[-len(names) :])
            text = write_json(out.with_suffix(".json"), result)
    if args.sweep:
        result["sweep"] = sweep(models, tokens[0], args.device, args.repeats)
        show_sweep(result["sweep"])
        text = write_json(out.with_suffix(".json"), result)
    plot(rows, where, out.with_suffix(".png"))
    print(f"\nwrote {out.with_suffix('.json')} and {out.with_suffix('.png')}")
    print(text)


if __name__ == "__main__":
    main()
