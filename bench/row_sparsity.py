"""What would it save, and cost, to leave rows of near-certain tokens out of the head's two backward GEMMs?

    python -m bench.row_sparsity                              the tiny model after its warm-up
    python -m bench.row_sparsity --model warm runs/tiny/hf    and a trained one beside it

Row t of dlogits is dz_t = g_t (e - p_t), e the one-hot target and q_t = 1 - p_t[target]. As the other probabilities sum to q_t,
q_t <= ||e - p_t|| <= sqrt(2) q_t. With s_t = sqrt(2) |g_t| q_t ||x_t||, every score of the dropped rows known and K the norm
of what is left, three statements hold, whatever the model:

    dW     ||error||_F <= S = sum of s_t over dropped rows; relative to dW at most S / (K - S), if S < K
    dX     ||error||_F <= E = sqrt(sum (|g_t| q_t r_t)^2), r_t = ||w_target - c|| + max_j ||w_j - c||, c the mean row of W;
           relative to dX at most E / sqrt(K^2 + E^2), since the errors are the dropped rows themselves. r_t is at least the
           largest distance of the target's row to another, and costs V D instead of V^2 D
    body   nothing: a dropped token sends no gradient at all into the layers below, and what these make of it is their
           Jacobian's matter. Its error is measured here, not bounded.

The first is a triangle inequality: it allows for all rows to point the same way. Rows of responses without advantage are left
out before (exact, and done in training anyway). Everything is in float64 except the hidden states of the model's own fp32
norms; "bf16 dlogits" is the error that rounding dz to bf16 makes on the same rows. Then the same for large models, whose
distributions of q are assumed (ASSUMED), not measured. Writes bench/results/row_sparsity.json; the last line is JSON.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.harness import ROOT, provenance, table, write_json
from drgrpo.advantage import group_advantage
from drgrpo.arithmetic import problems
from drgrpo.data import step_problems
from drgrpo.engine import Sampling, TorchEngine
from drgrpo.grade import grade
from drgrpo.model import load_policy
from drgrpo.pack import pack
from drgrpo.rollout import rollout, tokenize
from drgrpo.templates import get_template
from drgrpo.warmup import Warmup, cached_tiny_model

PROMPTS, GROUP, BUDGET = 32, 8, 96  # of the tiny recipe
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TARGETS = (1e-3, 3e-3, 1e-2)  # relative errors of dW to stay under

ASSUMED = {  # share of tokens with q below each of THRESHOLDS; assumptions
    "broad": (0.65, 0.45, 0.30, 0.18, 0.10, 0.05),
    # Half of Qwen3-8B's tokens have an entropy below 0.01 nats, which two outcomes reach at q = 0.0014, and a fifth above 0.67
    # (arXiv 2506.01939, as summarized in public). The tail below is not published.
    "half certain": (0.78, 0.60, 0.47, 0.35, 0.25, 0.17),
    "collapsed": (0.92, 0.85, 0.75, 0.62, 0.50, 0.38),
}
HEADS = {  # D, V, layers, D of keys and values, MLP width: Qwen2.5
    "7B": (3584, 152_064, 28, 512, 18_944),
    "1.5B": (1536, 151_936, 28, 256, 8960),
}


# ---- rows, scores, bounds


@dataclass(frozen=True)
class Rows:
    """What the two backward GEMMs work on, float64."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    g_N: Tensor  # d loss / d log-prob
    miss_N: Tensor  # q, summed over the other tokens: 1 - p would lose its digits
    dz_NV: Tensor

    @property
    def score_N(self) -> Tensor:
        """Bound on the norm of each row's part of dW."""
        return math.sqrt(2) * self.g_N.abs() * self.miss_N * self.hidden_ND.norm(dim=1)

    @property
    def reach_N(self) -> Tensor:
        """Bound on the norm of each row of dX."""
        distance_V = (self.weight_VD - self.weight_VD.mean(0)).norm(dim=1)
        return self.g_N.abs() * self.miss_N * (distance_V[self.target_N] + distance_V.max())


def make_rows(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, g_N: Tensor) -> Rows:
    hidden_ND, weight_VD, g_N = hidden_ND.double(), weight_VD.double(), g_N.double()
    p_NV, index = torch.softmax(hidden_ND @ weight_VD.T, dim=1), target_N[:, None]
    miss_N = p_NV.scatter(1, index, 0.0).sum(1)
    dz_NV = (-p_NV).scatter(1, index, miss_N[:, None]) * g_N[:, None]
    return Rows(hidden_ND, weight_VD, target_N, g_N, miss_N, dz_NV)


def bound_dweight(score_N: Tensor, kept_norm: float) -> float:
    """Relative error of dW at most, from the scores of the dropped rows and the norm of what the others gave."""
    total = score_N.sum().item()
    return total / (kept_norm - total) if total < kept_norm else math.inf


def bound_dhidden(reach_N: Tensor, kept_norm: float) -> float:
    """The same of dX."""
    error = reach_N.norm().item()
    return error / math.hypot(kept_norm, error) if error else 0.0


def gemm_saved(dropped: float) -> float:
    """Share of the head's three GEMMs: two of them lose these rows, the logits are needed to know."""
    return 2 / 3 * dropped


def distance(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def drop(rows: Rows, dropped_N: Tensor) -> dict[str, float | None]:
    """Errors and bounds when these rows are left out."""
    dx_ND, dw_VD = rows.dz_NV @ rows.weight_VD, rows.dz_NV.T @ rows.hidden_ND
    kept_N = ~dropped_N
    dx_kept, dw_kept = dx_ND * kept_N[:, None], rows.dz_NV[kept_N].T @ rows.hidden_ND[kept_N]
    square_N = rows.dz_NV.square().sum(1) * rows.hidden_ND.square().sum(1)
    lost, alone = (dw_VD - dw_kept).norm().item(), square_N[dropped_N].sum().sqrt().item()
    bound = bound_dweight(rows.score_N[dropped_N], dw_kept.norm().item())
    share = dropped_N.double().mean().item()
    return {
        "dropped": share,
        "gemm_saved": gemm_saved(share),
        "square_share": (square_N[dropped_N].sum() / square_N.sum()).item(),
        "alignment": lost / alone if alone else None,  # 1 if the dropped rows' directions are unrelated, more if they add up
        "dweight": distance(dw_kept, dw_VD),
        "dweight_bound": bound if math.isfinite(bound) else None,  # None: nothing is certified
        "dhidden": distance(dx_kept, dx_ND),
        "dhidden_bound": bound_dhidden(rows.reach_N[dropped_N], dx_kept.norm().item()),
    }


def allowed(rows: Rows, error: float) -> dict[str, float]:
    """Share of rows that may go, smallest scores first, for a relative error of dW of at most `error`: certified by the
    scores (S <= error ||dW|| / (1 + 2 error) implies S / (K - S) <= error), and in fact (in steps of half a percent)."""
    order = rows.score_N.argsort()
    norm = (rows.dz_NV.T @ rows.hidden_ND).norm().item()
    certified = int((rows.score_N[order].cumsum(0) <= error * norm / (1 + 2 * error)).sum())
    lost, fine = torch.zeros_like(rows.weight_VD), 0
    for part in order.split(max(len(order) // 200, 1)):
        lost += rows.dz_NV[part].T @ rows.hidden_ND[part]
        if lost.norm().item() > error * norm:
            break
        fine += len(part)
    return {"error": error, "certified": certified / len(order), "actual": fine / len(order)}


def accumulate(batches: list[Rows], threshold: float = 1e-3) -> dict[str, float]:
    """Does the error average out? Relative error of dW, by dropping and by bf16 dlogits, in one batch (mean) and in the sum
    over all of them, whose own noise averages out too."""
    dw, dropping, rounding = [], [], []
    for rows in batches:
        dropped_N = rows.score_N < threshold * rows.score_N.max()
        dw.append(rows.dz_NV.T @ rows.hidden_ND)
        dropping.append(rows.dz_NV[dropped_N].T @ rows.hidden_ND[dropped_N])
        rounding.append(rows.dz_NV.bfloat16().double().T @ rows.hidden_ND - dw[-1])
    found = {"threshold": threshold}
    for name, error in (("dropping", dropping), ("bf16", rounding)):
        found[f"{name}, one batch"] = fmean((e.norm() / d.norm()).item() for e, d in zip(error, dw, strict=True))
        found[f"{name}, all batches"] = (sum(error).norm() / sum(dw).norm()).item()
    return found


# ---- the tiny model


def measure(path: str, batches: int) -> dict:
    """Batches of rollouts of the model at `path`, as the tiny recipe draws them: one by one, and together."""
    tokenizer, template = AutoTokenizer.from_pretrained(path), get_template("arithmetic")
    cpu, f32 = torch.device("cpu"), torch.float32
    asked = tokenize(problems("train"), template, tokenizer, 64)[0]
    engine = TorchEngine(path, tokenizer, dtype=f32, device=cpu, batch=256, max_tokens=64 + BUDGET)
    sampling = Sampling(max_new_tokens=BUDGET, stop_token_ids=(tokenizer.eos_token_id,))
    policy = load_policy(path, dtype=f32, device=cpu, attention="sdpa", kernel="torch").double()
    found, kept = [], []
    for step in range(1, batches + 1):
        rollouts = rollout(engine, tokenizer, step_problems(asked, step, PROMPTS, 0), GROUP, sampling, 0, step)
        rewards = [grade(r.text, r.problem.answer, template.answer).score * r.completion.finished for r in rollouts]
        advantage_B = group_advantage(torch.tensor(rewards).view(PROMPTS, GROUP), "drgrpo").flatten()
        sequences = [
            (r.problem.prompt_ids, r.completion.token_ids, r.completion.logprobs, a)
            for r, a in zip(rollouts, advantage_B.tolist(), strict=True)
            if a != 0
        ]
        if not sequences:
            raise SystemExit(f"{path}: no response of batch {step} has an advantage; there is no gradient to look at")
        rows, body = head_rows(policy, pack(sequences))
        kept.append(rows)
        found.append({"n": len(rows.g_N), "accuracy": fmean(rewards), "responses": len(sequences)} | sparsity(rows, body))
    return {"batches": found, "accumulated": accumulate(kept)}


def head_rows(policy, batch) -> tuple[Rows, Callable[[Tensor], Tensor]]:
    """Rows of a packed batch, strictly on-policy: g = -A / (B C). And what turns dX into the gradient below the head."""
    hidden_TD = policy.lm.base_model(
        input_ids=batch.token_T[None], position_ids=batch.position_T[None], use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen, max_length_k=batch.max_seqlen,
    ).last_hidden_state[0]  # fmt: skip
    hidden_ND, weight_VD = hidden_TD[batch.row_N], policy.lm.get_output_embeddings().weight.detach()
    parameters = list(policy.lm.base_model.parameters())

    def body(dx_ND: Tensor) -> Tensor:
        gradients = torch.autograd.grad(hidden_ND, parameters, dx_ND.to(hidden_ND.dtype), retain_graph=True)
        return torch.cat([x.flatten() for x in gradients]).double()

    rows = make_rows(hidden_ND.detach(), weight_VD, batch.target_N, -batch.advantage_N / (PROMPTS * GROUP * BUDGET))
    return rows, body


def sparsity(rows: Rows, body: Callable[[Tensor], Tensor]) -> dict:
    """Everything about one batch."""
    dx_ND, dw_VD = rows.dz_NV @ rows.weight_VD, rows.dz_NV.T @ rows.hidden_ND
    whole, rounded = body(dx_ND), rows.dz_NV.bfloat16().double()
    thresholds = []
    for threshold in THRESHOLDS:
        dropped_N = rows.score_N < threshold * rows.score_N.max()
        below = body(dx_ND * ~dropped_N[:, None])
        thresholds.append({"threshold": threshold} | drop(rows, dropped_N) | {"body": distance(below, whole)})
    return {
        "q_below": [(rows.miss_N < q).double().mean().item() for q in THRESHOLDS],
        "bf16": {
            "dweight": distance(rounded.T @ rows.hidden_ND, dw_VD),
            "dhidden": distance(rounded @ rows.weight_VD, dx_ND),
            "body": distance(body(rounded @ rows.weight_VD), whole),
        },
        "thresholds": thresholds,
        "allowed": [allowed(rows, error) for error in TARGETS],
    }


# ---- large models, assumed


def moments(below: tuple[float, ...]) -> list[tuple[float, float, float]]:
    """(share, sum of q, sum of q^2) of an average token in each piece of a distribution, the largest q first: log-uniform
    within [0.1, 1] and each decade below; what lies under the last threshold counts as if it were there."""
    edges, shares = (1.0, *THRESHOLDS), (1.0, *below)
    pieces = []
    for (high, low), (upto, under) in zip(pairwise(edges), pairwise(shares), strict=True):
        share, log = upto - under, math.log(high / low)
        pieces.append((share, share * (high - low) / log, share * (high**2 - low**2) / (2 * log)))
    last = THRESHOLDS[-1]
    return [*pieces, (below[-1], below[-1] * last, below[-1] * last**2)]


def head_share(model: str) -> float:
    """Share of the head in the matrix FLOPs of a step without attention's own and without recomputation: an upper limit."""
    D, V, layers, kv, mlp = HEADS[model]
    body = layers * (2 * D * D + 2 * D * kv + 3 * D * mlp)
    return V * D / (V * D + body)


def model_row(name: str, i: int, tokens: int) -> dict:
    """All rows with q < THRESHOLDS[i] dropped; |g| and ||x|| the same everywhere, q <= ||e - p|| <= sqrt(2) q. dW relative
    error at most: `independent`, rows of unrelated directions, norms add in squares; `aligned`, the dropped rows all point
    the same way and the kept ones do not: what the certificate has to assume."""
    pieces = moments(ASSUMED[name])
    kept, gone = pieces[: i + 1], pieces[i + 1 :]
    kept_norm = math.sqrt(tokens * sum(p[2] for p in kept))
    independent = math.sqrt(2 * tokens * sum(p[2] for p in gone)) / kept_norm
    aligned = math.sqrt(2) * tokens * sum(p[1] for p in gone) / kept_norm
    dropped = sum(p[0] for p in gone)
    return {
        "distribution": name, "threshold": THRESHOLDS[i], "tokens": tokens, "dropped": dropped,
        "gemm_saved": gemm_saved(dropped), "independent": independent, "aligned": aligned,
        "step_saved": {model: gemm_saved(dropped) * head_share(model) for model in HEADS},
    }  # fmt: skip


# ---- the report


def percent(key: str, digits: int = 1) -> Callable[[dict], str]:
    return lambda row: f"{row[key]:.{digits}%}"


def small(key: str) -> Callable[[dict], str]:
    return lambda row: "-" if row[key] is None else f"{row[key]:.1e}"


def mean_rows(found: list[dict], key: str) -> list[dict]:
    """The rows of `key`, averaged over batches; None where a batch has none."""

    def mean(values):
        return None if None in values else fmean(values)

    return [{k: mean([row[k] for row in same]) for k in same[0]} for same in zip(*(f[key] for f in found), strict=True)]


def spread(values: list[float]) -> str:
    return f"{fmean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def show(name: str, measured: dict) -> None:
    found, together = measured["batches"], measured["accumulated"]
    total = sum(f["n"] for f in found)
    print(f"\n{name}: {len(found)} batches of {PROMPTS} x {GROUP} responses, {total} tokens with advantage, "
          f"accuracy {fmean(f['accuracy'] for f in found):.2f}; means over batches")  # fmt: skip
    below = [fmean(values) for values in zip(*(f["q_below"] for f in found), strict=True)]
    print("tokens with q below " + ", ".join(f"{q:g}: {share:.1%}" for q, share in zip(THRESHOLDS, below, strict=True)))
    rounding = {key: fmean(f["bf16"][key] for f in found) for key in ("dweight", "dhidden", "body")}
    print("bf16 dlogits: " + ", ".join(f"{key} {value:.1e}" for key, value in rounding.items()))
    columns = {
        "dropped: score / largest <": lambda r: f"{r['threshold']:g}", "rows": percent("dropped"),
        "GEMMs saved": percent("gemm_saved"), "sq. norm": small("square_share"),
        "alignment": lambda r: "-" if r["alignment"] is None else f"{r['alignment']:.1f}", "dW": small("dweight"),
        "dW bound": small("dweight_bound"), "dX": small("dhidden"), "dX bound": small("dhidden_bound"), "body": small("body"),
    }  # fmt: skip
    print(table(mean_rows(found, "thresholds"), columns))
    for i, error in enumerate(TARGETS):
        certified, actual = ([f["allowed"][i][key] for f in found] for key in ("certified", "actual"))
        print(f"rows that may go for dW within {error:g}: certified {spread(certified)}, in fact {spread(actual)}")
    print(f"error of dW, dropped below {together['threshold']:g}: " + ", ".join(
        f"{key} {value:.1e}" for key, value in together.items() if key != "threshold"))  # fmt: skip


def show_model(rows: list[dict]) -> None:
    print(f"\nassumed distributions, {rows[0]['tokens']} tokens; head at most " + ", ".join(
        f"{head_share(model):.1%} of a {model} step" for model in HEADS))  # fmt: skip
    columns = {
        "distribution": lambda r: r["distribution"], "q <": lambda r: f"{r['threshold']:g}", "rows": percent("dropped"),
        "GEMMs saved": percent("gemm_saved"), "dW, independent": small("independent"), "dW, aligned": small("aligned"),
    } | {f"{model} step": lambda r, model=model: f"{r['step_saved'][model]:.1%}" for model in HEADS}  # fmt: skip
    print(table(rows, columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["warm"], help="folders; `warm` is the tiny model after its warm-up")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16_384, help="a call, for the assumed distributions")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/row_sparsity.json")
    args = parser.parse_args()
    where, measured = provenance("cpu"), {}
    print(" ".join(f"{key}={value}" for key, value in where.items()))
    for name in args.model:
        path = cached_tiny_model(Warmup(), ROOT / "runs/warmup") if name == "warm" else Path(name)
        measured[name] = measure(str(path), args.batches)
        show(name, measured[name])
    model = [model_row(name, i, args.tokens) for name in ASSUMED for i in range(len(THRESHOLDS))]
    show_model(model)
    print(f"\nwrote {args.out}")
    print(write_json(args.out, {"where": where, "measured": measured, "assumed": ASSUMED, "model": model}))


if __name__ == "__main__":
    main()
