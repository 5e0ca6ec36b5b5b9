"""Speed, memory and error of the fused head, beside other programs that compute the same.

    python -m bench.bench_linear_drgrpo                              both models, four token counts
    python -m bench.bench_linear_drgrpo --models 7B --tokens 16384   one shape
    python -m bench.bench_linear_drgrpo --cases frozen-head          one case
    python -m bench.bench_linear_drgrpo --sweep                      other block and chunk sizes too
    python -m bench.bench_linear_drgrpo --device cpu                 the torch backend, small sizes

There are four cases:

    on-policy     forward and backward without old log-probs
    old-logprob   the same with old log-probs: the ratio is 0.9, or 1.65 and clipped for a tenth
    frozen-head   on-policy without the gradient of the weight, which LoRA does not train
    logprob       log-probs alone

Every contender gets the same hidden states, weight, targets and an advantage of 1. Without old
log-probs the gradient of Dr. GRPO is that of the mean cross-entropy, so the cross-entropy kernels
compete on equal terms. The denominator is the bare GEMMs: three, or two with a frozen head, or one
for log-probs. Targets are sampled from the softmax, so entropies are realistic; tensors of zeros
would run at higher clocks.

First the fused head must be as exact as plain autograd, or nothing is timed. Then, per case and
shape: milliseconds (p20, p50, p80), peak memory beyond the inputs, relative errors of the gradients
or the log-probs' error against float64 on the first tokens, host syncs. A contender that is not
installed, does not run on this machine or does not know the case is listed with the reason. The
benchmark writes OUT.json after every shape, then OUT.png. The last line of stdout is JSON.

The sweep times forward and backward at the first token count with other sizes of a row program,
then other chunks with the fastest of those. It prints the card's entry for TUNED in
kernels/linear_drgrpo.py.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.harness import RESULTS, interleaved, markdown, peak_memory, provenance, quantiles
from bench.static_report import SHAPES
from drgrpo.kernels import linear_drgrpo as head

MODELS = SHAPES | {"tiny": (64, 260), "small": (256, 8192)}
DEFAULTS = {
    "cuda": (["7B", "1.5B"], [2048, 4096, 16_384, 65_536]),
    "cpu": (["tiny", "small"], [1024, 4096]),
}
CASES = ("on-policy", "old-logprob", "frozen-head", "logprob")
CLIP = 0.2  # the default of linear_drgrpo_loss
ERROR_TOKENS, ERRORS = 256, ("dhidden", "dweight", "logprob_rms")
# What a sweep tries: (BLOCK_V, NUM_WARPS) that fit the registers, of which the torch backend has
# none, and tokens of the largest chunk at the widest vocabulary.
PROGRAMS = {"cuda": [(4096, 8), (4096, 16), (8192, 16), (8192, 32), (16_384, 32)], "cpu": []}
CHUNKS = {"cuda": [4096, 6144, 12_288], "cpu": [128, 256]}
NOISE = 0.01  # a gain of a smaller share is none


class Skip(Exception):
    """The reason why a contender does not take part."""


@dataclass(frozen=True)
class Case:
    name: str  # of CASES
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D], without gradient where the head is frozen
    target: Tensor  # [T]
    advantage: Tensor  # [T], ones
    old_logprob: Tensor | None = None  # [T]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.target

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        """(dhidden, dweight) of a loss, or (dhidden,) where the head is frozen."""
        trained = [x for x in (self.hidden, self.weight) if x.requires_grad]
        return torch.autograd.grad(loss, trained)

    def first(self, tokens: int) -> "Case":
        hidden = self.hidden[:tokens].detach().requires_grad_()
        target, advantage = self.target[:tokens], self.advantage[:tokens]
        old = None if self.old_logprob is None else self.old_logprob[:tokens]
        return replace(self, hidden=hidden, target=target, advantage=advantage, old_logprob=old)


@dataclass(frozen=True)
class Contender:
    """Functions of one case: `step` computes the gradients of the loss, `logprob` the log-probs."""

    step: Callable[[], tuple[Tensor, ...]]
    logprob: Callable[[], Tensor] | None = None


def make_case(T: int, D: int, V: int, device: str, name: str = "on-policy") -> Case:
    """Hidden states as after a final norm, a weight that gives entropies of about one nat, targets
    sampled by the Gumbel trick. Sampling goes in pieces, because [T, V] may not fit."""
    rng = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spread = math.sqrt(2 * math.log(V) / D)
    hidden = torch.randn(T, D, generator=rng, device=device).to(dtype)
    weight = (torch.randn(V, D, generator=rng, device=device) * spread).to(dtype)
    target = torch.empty(T, dtype=torch.int64, device=device)
    for start in range(0, T, 512):
        logits = (hidden[start : start + 512] @ weight.T).float()
        gumbel = torch.empty_like(logits).exponential_(generator=rng).log_().neg_()
        target[start : start + 512] = (logits + gumbel).argmax(-1)
    old = None
    if name == "old-logprob":  # no ratio is so near a bound that rounding decides whether it is cut
        clipped = torch.rand(T, generator=rng, device=device) < 0.1
        log_ratio = torch.where(clipped, 0.5, math.log(0.9))
        old = head.linear_logprob(hidden, weight, target)[0] - log_ratio
    weight.requires_grad_(name != "frozen-head")
    ones = torch.ones(T, device=device)
    return Case(name, hidden.requires_grad_(), weight, target, ones, old)


# ---- contenders: each takes a case and returns a Contender, or raises Skip or ImportError

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden states, weight and targets."""


def from_loss(case: Case, function: Function) -> Contender:
    """The contender whose loss is `function`; autograd does the rest."""
    return Contender(lambda: case.backward(function(*case.inputs)))


def from_cross_entropy(case: Case, function: Function) -> Contender:
    """The contender whose loss is the mean cross-entropy. It has the on-policy gradients."""
    if case.old_logprob is not None:
        raise Skip("takes no old log-probs")
    return from_loss(case, function)


def from_logprob(case: Case, function: Function) -> Contender:
    """The contender whose log-probs are `function`. The loss is Dr. GRPO."""

    def loss(*inputs):
        logprob = function(*inputs)
        old = logprob.detach() if case.old_logprob is None else case.old_logprob
        ratio = (logprob - old).exp()
        bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
        return -torch.minimum(ratio * case.advantage, bounded * case.advantage).mean()

    return Contender(from_loss(case, loss).step, torch.no_grad()(lambda: function(*case.inputs)))


def fused(case: Case, logits_dtype: head.LogitsDtype = None) -> Contender:
    """This repository's head; None is the type of the hidden states."""
    how = dict(logits_dtype=logits_dtype or case.hidden.dtype)
    rest = dict(old_logprob=case.old_logprob, scale=1 / len(case.target))

    def loss(*inputs):
        return head.linear_drgrpo_loss(*inputs, case.advantage, **rest, **how)[0]

    step = from_loss(case, loss).step
    return Contender(step, lambda: head.linear_logprob(*case.inputs, **how)[0])


def fused_other_logits(case: Case, logits_dtype: head.LogitsDtype) -> Contender:
    if case.hidden.dtype == torch.float32:
        raise Skip("the inputs are fp32, and so are the logits of fused")
    return fused(case, logits_dtype)


def gemms(case: Case) -> Contender:
    """The floor: the matrix products and nothing else. Its results are no gradients."""
    x, w = case.hidden.detach(), case.weight.detach()

    def step():
        z = x @ w.T
        return (z @ w, z.T @ x) if case.weight.requires_grad else (z @ w,)

    return Contender(step, lambda: x @ w.T)


def gemms_chunked(case: Case) -> Contender:
    """The same products in the fused head's chunks, with dW accumulated in fp32."""
    x, w = case.hidden.detach(), case.weight.detach()
    chunk = head.default_chunk_tokens(*x.shape, len(w), head.sizes_on(x.device))

    def step():
        z = x.new_empty(min(chunk, len(x)), len(w))
        dx, dw = torch.empty_like(x), None
        if case.weight.requires_grad:
            dw = w.new_empty(w.shape, dtype=torch.float32)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            n = len(x[part])
            head._matmul(x[part], w.T, z[:n])
            head._matmul(z[:n], w, dx[part])
            if dw is not None:
                head._matmul(z[:n].T, x[part], dw, accumulate=start > 0)
        return dx, dw

    return Contender(step)


def naive_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def naive(case: Case) -> Contender:
    """bf16 logits, upcast to fp32, log_softmax, gather, autograd."""
    return from_logprob(case, naive_logprob)


def compiled(case: Case) -> Contender:
    return from_logprob(case, torch.compile(naive_logprob))


def naive_cross_entropy(case: Case) -> Contender:
    """F.cross_entropy on bf16 logits."""

    def loss(hidden, weight, target):
        return F.cross_entropy(hidden @ weight.T, target)

    return from_cross_entropy(case, loss)


def torch_linear_cross_entropy(case: Case) -> Contender:
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return from_cross_entropy(case, partial(F.linear_cross_entropy, options=options))


def trl_full_logits(case: Case) -> Contender:
    from trl.trainer.utils import selective_log_softmax

    return from_logprob(case, lambda hidden, w, target: selective_log_softmax(hidden @ w.T, target))


def trl_chunked(case: Case) -> Contender:
    """TRL's own Triton head, as its GRPOTrainer calls it: log-probs and the entropy, no softcap
    and no logit scale. By default the function computes three statistics more."""
    from trl.trainer import utils

    chunk, outputs = utils._CHUNKED_LOGPROB_CHUNK_SIZE, ("entropy",)

    def logprob(hidden, weight, target):
        args = (hidden, weight, None, target, 1.0, chunk, None, 1.0, outputs)
        return utils._ChunkedLogProbFunction.apply(*args)[0]

    return from_logprob(case, logprob)


def unsloth(case: Case) -> Contender:
    """Unsloth's head, as its GRPO calls it: log-probs and the entropy, which has no gradient.
    `import unsloth` would patch TRL, and unsloth_zoo alone asks for this variable. The settings of
    the allocator that unsloth_zoo writes to the environment are undone."""
    with patch.dict(os.environ, UNSLOTH_IS_PRESENT="1"):
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

    options = dict(return_entropy=True, entropy_requires_grad=False)
    return from_logprob(case, lambda *inputs: fused_linear_logprobs(*inputs, **options)[0])


def in_sequences(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """(hidden [B, L, D], target [B, L], advantage [B], old_logprob [B, L], L): Liger's losses take
    padded responses with one advantage each."""
    T, D = case.hidden.shape
    L = next(length for length in (1024, 512, 256, 1) if T % length == 0)
    old = None if case.old_logprob is None else case.old_logprob.view(-1, L)
    advantage = case.advantage[::L].contiguous()
    return case.hidden.view(-1, L, D), case.target.view(-1, L), advantage, old, L


def liger_grpo(case: Case) -> Contender:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, target, advantage, old, L = in_sequences(case)
    options = dict(beta=0.0, use_ref_model=False, compiled=case.hidden.is_cuda)
    options |= dict(epsilon_low=CLIP, epsilon_high=CLIP)
    options |= dict(loss_type="dr_grpo", max_completion_length=L)
    function, mask = LigerFusedLinearGRPOLoss(**options), torch.ones_like(target)

    def loss(_, weight, __):
        return function(hidden, weight, target, mask, advantage, old_per_token_logps=old)[0]

    return from_loss(case, loss)


def liger_triton_grpo(case: Case) -> Contender:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    hidden, target, advantage, old, L = in_sequences(case)
    options = dict(temperature=1.0, beta=0.0, eps_low=CLIP, eps_high=CLIP)
    options |= dict(loss_type="dr_grpo", max_completion_length=L, reduce=True)

    def loss(_, weight, __):
        logits = F.pad(hidden, (0, 0, 0, 1)) @ weight.T  # it expects one position more
        return triton_grpo_loss(logits, old, None, target, advantage, **options)[0]

    return from_loss(case, loss)


def liger_cross_entropy(case: Case) -> Contender:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    function = LigerFusedLinearCrossEntropyFunction.apply
    return from_cross_entropy(case, lambda *inputs: function(*inputs)[0])


def cce(case: Case, **options) -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    options |= dict(reduction="none")
    return from_logprob(case, lambda *inputs: -linear_cross_entropy(*inputs, **options))


def verl(case: Case) -> Contender:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return from_logprob(case, lambda *inputs: linear_cross_entropy(*inputs, 1.0, "none")[0])


def quack(case: Case) -> Contender:
    """On sm_90 its scaled-exp pipeline, on other cards its base pipeline."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return from_cross_entropy(case, chunked_linear_cross_entropy)


FLOORS = ("bare GEMMs", "GEMMs in chunks, fp32 dW")
CONTENDERS = {
    "bare GEMMs": gemms,
    "GEMMs in chunks, fp32 dW": gemms_chunked,
    "fused (this repository)": fused,
    "fused, fp32 logits": partial(fused_other_logits, logits_dtype=torch.float32),
    "fused, shifted logits": partial(fused_other_logits, logits_dtype="shifted"),
    "torch, fp32 upcast": naive,
    "torch, cross_entropy": naive_cross_entropy,
    "torch.compile": compiled,
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "TRL full logits": trl_full_logits,
    "TRL chunked": trl_chunked,
    "Unsloth fused": unsloth,
    "Liger fused GRPO": liger_grpo,
    "Liger triton_grpo_loss": liger_triton_grpo,
    "Liger fused CE": liger_cross_entropy,
    "CCE": cce,
    "CCE, no filter": partial(cce, filter_eps=None),
    "verl fused": verl,
    "quack": quack,
}
LIGER = "Liger triton_grpo_loss", "Liger fused CE"
NEED_CUDA = (*LIGER, "CCE", "CCE, no filter", "verl fused", "quack")

# ---- measuring


def runner(build: Callable[[Case], Contender], case: Case) -> Callable:
    """The function of a contender that the case times."""
    contender = build(case)
    if case.name != "logprob":
        return contender.step
    if contender.logprob is None:
        raise Skip("gives no log-probs alone")
    return contender.logprob


def exact(case: Case) -> Tensor | tuple[Tensor, ...]:
    """What the contenders compute, in float64: the log-probs or the gradients."""
    hidden = case.hidden.detach().double().requires_grad_()
    weight = case.weight.detach().double().requires_grad_(case.weight.requires_grad)
    double = replace(case, hidden=hidden, weight=weight)
    options = dict(old_logprob=case.old_logprob, scale=1 / len(case.target))
    loss, stats = head.linear_drgrpo_loss_ref(*double.inputs, case.advantage, **options)
    return stats["logprob"] if case.name == "logprob" else double.backward(loss)


def distance(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


def errors(build: Callable[[Case], Contender], case: Case, truth: Any) -> dict[str, float]:
    """Relative errors of the gradients, or the log-probs' root mean square error in nats. `truth`
    is the result of `exact`."""
    found = runner(build, case)()
    if case.name == "logprob":
        return {"logprob_rms": (found.double() - truth).square().mean().sqrt().item()}
    return dict(zip(ERRORS, map(distance, found, truth), strict=False))


def check(case: Case, truth: Any) -> None:
    """The fused head's results are at most 1.1 times as far from float64 as plain autograd's
    (fp32: 1e-5)."""
    fused_errors, plain_errors = errors(fused, case, truth), errors(naive, case, truth)
    slack = 1e-5 if case.hidden.dtype == torch.float32 else 1e-4
    for name, error in fused_errors.items():
        if not error <= 1.1 * plain_errors[name] + slack:
            off = f"{name} is off by {error:.2e}, autograd by {plain_errors[name]:.2e}"
            sys.exit(f"not timing a wrong kernel: {off} ({case.name})")


def probe(name: str, case: Case, small: Case, truth: Any) -> tuple[Callable, dict]:
    """The function of a contender that runs at this shape, with its memory, host syncs and
    errors."""
    device = case.hidden.device.type
    if name in NEED_CUDA and device != "cuda":
        raise Skip("needs CUDA")
    run = runner(CONTENDERS[name], case)
    run()  # compiles, tunes, and shows whether it fits
    facts = {"peak_bytes": peak_memory(run, device), "host_syncs": harness.host_syncs(run, device)}
    if name not in FLOORS:
        facts["errors"] = errors(CONTENDERS[name], small, truth)
    return run, facts


def reason(name: str, error: Exception) -> str:
    """Why a contender is skipped. A failure of the fused head is no reason and is raised."""
    if isinstance(error, Skip):
        return str(error)
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    if name.startswith("fused"):
        raise error
    first_line = (str(error).splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first_line[:120]}"


def measure(
    model: str, T: int, device: str, names: list[str], repeats: int, case_name: str = CASES[0]
) -> list[dict]:
    """One row per contender: its numbers if it runs at this shape, else the reason."""
    D, V = MODELS[model]
    case = make_case(T, D, V, device, case_name)
    small = case.first(min(ERROR_TOKENS, T))
    truth = exact(small)
    check(small, truth)
    rows, runs = [], {}
    for name in names:
        row = {"model": model, "T": T, "D": D, "V": V, "case": case_name, "contender": name}
        rows.append(row)
        try:
            runs[name], facts = probe(name, case, small, truth)
            row |= facts
        except Exception as error:  # of other projects' code, at a shape they may not support
            row["skipped"] = reason(name, error)
    times = {name: quantiles(ms) for name, ms in interleaved(runs, device, repeats).items()}
    for row in rows:
        if ms := times.get(row["contender"]):
            row |= {"ms": ms, "ratio": ms["p50"] / times[FLOORS[0]]["p50"]}
    return rows


# ---- which sizes are fastest


def time_sizes(
    candidates: list[head.Sizes], steps: dict[str, Callable], device: str, repeats: int
) -> list[dict]:
    """Times every model's step with every candidate, in turns. The score of a candidate is its time
    over the first candidate's, averaged over the models."""

    def sized(sizes: head.Sizes, step: Callable) -> None:
        """The step with these sizes, whatever is tuned for the card."""
        with patch.object(head, "sizes_on", lambda device: sizes):
            step()

    candidates = list(dict.fromkeys(candidates))
    pairs = list(product(candidates, steps))
    runs = {(sizes, model): partial(sized, sizes, steps[model]) for sizes, model in pairs}
    for run in runs.values():
        run()  # compiles
    times = {key: quantiles(ms) for key, ms in interleaved(runs, device, repeats).items()}
    rows = []
    for sizes, model in pairs:
        ratios = [times[sizes, m]["p50"] / times[candidates[0], m]["p50"] for m in steps]
        row = {"model": model, "step_ms": times[sizes, model], "score": fmean(ratios)}
        rows.append(sizes._asdict() | row)
    return rows


def fastest(rows: list[dict]) -> tuple[head.Sizes, float]:
    """(sizes, score) of the best row."""
    row = min(rows, key=lambda row: row["score"])
    return head.Sizes(**{field: row[field] for field in head.Sizes._fields}), row["score"]


def sweep(models: list[str], T: int, device: str, repeats: int) -> dict:
    """Forward and backward by sizes: those of the row program, then chunks with the fastest of
    those. Scores are relative to the default sizes."""
    cases = {model: make_case(T, *MODELS[model], device) for model in models}
    steps = {model: fused(case).step for model, case in cases.items()}
    default, widest = head.sizes_on(torch.device(device)), max(MODELS[m][1] for m in models)
    programs = [default._replace(block_v=block, num_warps=w) for block, w in PROGRAMS[device]]
    rows = time_sizes([default, *programs], steps, device, repeats)
    program, _ = fastest(rows)
    chunks = [program._replace(chunk_logits=tokens * widest) for tokens in CHUNKS[device]]
    chunk_rows = time_sizes([default, program, *chunks], steps, device, repeats)
    best, score = fastest(chunk_rows)
    entry = head.Sizes(*best[:3])  # the card has its own number of processors
    better = device == "cuda" and score < 1 - NOISE
    return {
        "T": T,
        "rows": rows + chunk_rows,
        "default": default._asdict(),
        "best": best._asdict(),
        "gain": 1 - score,
        "tuned": f"{torch.cuda.get_device_capability()}: {entry}" if better else None,
    }


def show_sweep(result: dict) -> None:
    print(f"\nforward and backward at T = {result['T']} by sizes; score: over the default's time\n")
    heads = ["model", "block", "warps", "chunk logits", "ms (p20-p80)", "score"]
    lines = []
    for r in sorted(result["rows"], key=itemgetter("model", "score")):
        sizes = [r[field] for field in head.Sizes._fields]
        lines.append([r["model"], *sizes, span(r["step_ms"]), f"{r['score']:.3f}"])
    print(markdown(heads, lines))
    advice = f"TUNED should say {result['tuned']}" if result["tuned"] else "the default stays"
    print(f"best: {result['best']}, {result['gain']:.1%} faster; {advice}")


# ---- reporting


def span(ms: dict[str, float]) -> str:
    return f"{ms['p50']:.2f} ({ms['p20']:.2f}-{ms['p80']:.2f})"


def table(rows: list[dict]) -> str:
    """Markdown: the contenders that ran."""
    heads = ["shape", "case", "contender", "ms (p20-p80)", "/ GEMMs", "peak GB"]
    heads += ["err dX", "err dW", "err logp", "syncs"]
    lines = []
    for r in (row for row in rows if "ms" in row):
        known = r.get("errors", {})
        off = [f"{known[key]:.1e}" if key in known else "-" for key in ERRORS]
        syncs = "-" if r["host_syncs"] is None else r["host_syncs"]
        figures = [span(r["ms"]), f"{r['ratio']:.2f}", f"{r['peak_bytes'] / 1e9:.3f}", *off, syncs]
        lines.append([f"{r['model']}, {r['T']}", r["case"], r["contender"], *figures])
    return markdown(heads, lines)


def show(rows: list[dict]) -> None:
    print(f"\n{table(rows)}\n")
    for row in rows:
        if "skipped" in row:
            print(f"skipped {row['contender']}: {row['skipped']}")


def plot(rows: list[dict], where: dict, path: Path) -> None:
    """Time over the bare GEMMs and memory: two rows of panels per case, a column per shape."""
    shapes = list(dict.fromkeys((r["model"], r["T"]) for r in rows))
    cases = list(dict.fromkeys(r["case"] for r in rows))
    size = 4.5 * len(shapes), 8 * len(cases)
    figure, axes = harness.new_figure(2 * len(cases), len(shapes), size, squeeze=False)
    for (i, case), (j, shape) in product(enumerate(cases), enumerate(shapes)):
        here = [r for r in rows if (r["case"], r["model"], r["T"]) == (case, *shape)]
        timed = [r for r in here if "ms" in r]
        names = [r["contender"] for r in timed]
        times, memory = axes[2 * i : 2 * i + 2, j]
        bars(times, names, [r["ratio"] for r in timed], "time / bare GEMMs")
        bars(memory, names, [r["peak_bytes"] / 1e9 for r in timed], "peak memory (GB)")
        times.set_title(f"{case}: {shape[0]}, {shape[1]} tokens")
    figure.suptitle(f"LM head + Dr. GRPO loss: {where['device']}, torch {where['torch']}")
    harness.save_figure(figure, path, dpi=120)


def bars(axis, names: list[str], values: list[float], label: str) -> None:
    axis.barh(names, values, color=[color(name) for name in names])
    axis.bar_label(axis.containers[0], fmt="%.2f", padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(label)
    axis.tick_params(labelsize=7)


def color(contender: str) -> str:
    if contender in FLOORS:
        return "0.6"
    return "tab:blue" if contender.startswith("fused") else "tab:orange"


def parse_args() -> argparse.Namespace:
    parser = harness.command_line(__doc__)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default=default_device)
    add("--models", nargs="+", choices=list(MODELS))
    add("--tokens", nargs="+", type=int)
    add("--cases", nargs="+", choices=CASES, default=CASES)
    add("--only", nargs="+", choices=list(CONTENDERS), help="contenders beside the bare GEMMs")
    add("--repeats", type=int, default=20)
    add("--sweep", action="store_true", help="also time other block and chunk sizes")
    add("--out", type=Path, help="without suffix (default: bench/results/linear_drgrpo_<device>)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        way_out = "--device cpu runs the torch backend"
        parser.error(f"--device cuda: torch sees no CUDA device; {way_out}")
    models, tokens = DEFAULTS[args.device]
    args.models, args.tokens = args.models or models, args.tokens or tokens
    chosen = [*(args.only or CONTENDERS), FLOORS[0]]
    args.names = [name for name in CONTENDERS if name in chosen]
    return args


def main():
    args = parse_args()
    where = provenance(args.device)
    print(" ".join(f"{key}={value}" for key, value in where.items()))
    device_name = where["device"].split(",")[0].replace(" ", "-")
    out = args.out or RESULTS / f"linear_drgrpo_{device_name}"
    result = {"where": where, "repeats": args.repeats, "rows": []}
    for case, model, T in product(args.cases, args.models, args.tokens):
        rows = measure(model, T, args.device, args.names, args.repeats, case)
        show(rows)
        result["rows"] += rows
        text = harness.write_json(out.with_suffix(".json"), result)
    if args.sweep:
        result["sweep"] = sweep(args.models, args.tokens[0], args.device, args.repeats)
        show_sweep(result["sweep"])
        text = harness.write_json(out.with_suffix(".json"), result)
    plot(result["rows"], where, out.with_suffix(".png"))
    print(f"\nwrote {out.with_suffix('.json')} and {out.with_suffix('.png')}")
    print(text)


if __name__ == "__main__":
    main()
