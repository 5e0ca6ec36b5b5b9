"""Do the losses of TRL and Liger agree with ours on identical inputs?

`python -m bench.experiments.peers` runs it. Hidden states, weight, targets, masks, advantages and
old log-probs are given. Loss and both gradients of ours, of TRL's `GRPOTrainer.compute_loss` and of
Liger's `LigerFusedLinearGRPOLoss` are compared with the formula in float64. TRL's advantages are
compared with ours. TRL 1.16 computes log-probs with a kernel of its own
(trl/kernels/chunked_logprob.py), and `use_liger_kernel` is deprecated for GRPO. Liger's loss is
therefore called by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bench.harness import markdown
from drgrpo.advantage import group_advantage, token_weight
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss
from drgrpo.tiny.tokenizer import byte_tokenizer


@dataclass(frozen=True)
class Case:
    """Responses of uneven length, padded on the right: B responses, L tokens, width D, vocabulary
    V. `old` None: on-policy."""

    hidden_BLD: Tensor
    weight_VD: Tensor
    target_BL: Tensor
    mask_BL: Tensor
    advantage_B: Tensor
    old_BL: Tensor | None = None
    ref_BL: Tensor | None = None
    temperature: float = 1.0
    kl_coef: float = 0.0
    trl_options: dict = field(default_factory=dict)  # further ones of TRL
    budget: int = 32  # C, the constant that Dr. GRPO divides by
    parts: int = 1  # micro-batches that one optimizer step is split into

    def part(self, i: int) -> "Case":
        """The i-th micro-batch."""
        size = len(self.mask_BL) // self.parts
        batched = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        del batched["weight_VD"]
        return replace(self, **{k: v[i * size : (i + 1) * size] for k, v in batched.items()})

    def split(self, hidden_BLD: Tensor) -> list["Case"]:
        """The micro-batches, with these hidden states."""
        case = replace(self, hidden_BLD=hidden_BLD)
        return [case.part(i) for i in range(self.parts)]


CLIP, TOLERANCE = 0.2, 1e-5
LOSSES = {"dr_grpo": "drgrpo", "grpo": "grpo", "dapo": "dapo", "bnpo": "dapo"}
"""TRL's and Liger's names -> ours. dapo and bnpo both average over tokens: of the optimizer step,
and of the micro-batch."""


def make_cases(B: int = 8, L: int = 24, D: int = 64, V: int = 260) -> dict[str, Case]:
    rng = torch.Generator().manual_seed(0)
    hidden_BLD, weight_VD = (torch.randn(*shape, generator=rng) for shape in ((B, L, D), (V, D)))
    target_BL = torch.randint(V, (B, L), generator=rng)
    between = torch.randint(2, L, (B - 2,), generator=rng).tolist()
    length_B = torch.tensor([L, 1, *between])
    mask_BL = torch.arange(L) < length_B[:, None]
    advantage_B = torch.randn(B, generator=rng)
    base = Case(hidden_BLD, weight_VD / D**0.5, target_BL, mask_BL, advantage_B)

    def drifted(case: Case, by: float) -> Tensor:
        """Log-probs a little off those of the policy: ratios on both sides of both clips."""
        logprob = logprobs(case.hidden_BLD, case.weight_VD, case.target_BL, case.temperature)
        return (logprob + by * torch.randn(B, L, generator=rng)).float()

    off, warm = replace(base, old_BL=drifted(base, 0.3)), replace(base, temperature=0.7)
    kl = replace(off, kl_coef=0.04, ref_BL=drifted(base, 0.5))
    return {
        "on-policy": base,
        "off-policy": off,
        "off-policy, temperature 0.7": replace(warm, old_BL=drifted(warm, 0.3)),
        "off-policy, KL": replace(kl, trl_options={"use_bias_correction_kl": False}),
        "off-policy, KL, TRL's default": kl,
        "off-policy, two micro-batches": replace(off, parts=2),
    }


def logprobs(hidden, weight, target, temperature) -> Tensor:
    """Of the targets, in float64."""
    logits = hidden.double() @ weight.double().T / temperature
    return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def formula(case: Case, loss_type: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """The loss of one optimizer step in float64, response by response, as the papers print it:
    2503.20783 Fig. 1 (dr_grpo, grpo; the KL term as in 2402.03300 Eq. 3, inside the mean over
    tokens), 2503.14476 Eq. 8 (dapo, bnpo)."""
    logprob = logprobs(hidden, weight, case.target_BL, case.temperature)
    old = logprob.detach() if case.old_BL is None else case.old_BL.double()
    total, tokens = 0.0, int(case.mask_BL.sum())
    for i, advantage in enumerate(case.advantage_B.double()):
        length = int(case.mask_BL[i].sum())
        ratio = (logprob[i, :length] - old[i, :length]).exp()
        objective = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        if case.kl_coef:
            delta = case.ref_BL[i, :length].double() - logprob[i, :length]
            objective = objective - case.kl_coef * (delta.exp() - delta - 1)
        per_response = {"dr_grpo": case.budget, "grpo": length}.get(loss_type)
        share = 1 / tokens if per_response is None else 1 / (per_response * len(case.advantage_B))
        total = total - share * objective.sum()
    return total


def our_loss(case: Case, loss_type: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """As train.py calls it. Advantages are weighted over the whole optimizer step, only response
    tokens count, and micro-batches are summed."""
    weight_B = token_weight(case.mask_BL.sum(1), LOSSES[loss_type], case.budget)
    weighted = replace(case, advantage_B=case.advantage_B * weight_B)
    how = dict(clip_low=CLIP, clip_high=CLIP, temperature=case.temperature, kl_coef=case.kl_coef)
    how |= dict(scale=1 / (len(case.mask_BL) * case.budget))
    total = 0.0
    for part in weighted.split(hidden):
        mask = part.mask_BL
        inputs = part.hidden_BLD[mask], weight, part.target_BL[mask]
        advantage_N = part.advantage_B[:, None].expand_as(mask)[mask]
        old, ref = (None if x is None else x[mask] for x in (part.old_BL, part.ref_BL))
        others = dict(old_logprob=old, ref_logprob=ref)
        total = total + linear_drgrpo_loss(*inputs, advantage_N, **others, **how)[0]
    return total


class Given(nn.Module):
    """A backbone whose hidden states are given."""

    hidden = None

    def forward(self, *args, **kwargs):
        return SimpleNamespace(last_hidden_state=self.hidden)


QUIET = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
"""TRL's options for a CPU and for silence."""


def trl_trainer(model: str, folder: str, **arguments):
    """A `GRPOTrainer` that has not started: for its loss and its advantages."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    size = dict(per_device_train_batch_size=8, num_generations=8)
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(folder, **{**size, **QUIET, **arguments}),
        processing_class=byte_tokenizer(),
        reward_funcs=lambda answer, **_: answer,
        train_dataset=Dataset.from_dict({"prompt": ["0"] * 8, "answer": [0.0] * 8}),
    )
    trainer.model.train()
    return trainer


def trl_loss(model: str, folder: str):
    """TRL's own loss on given hidden states: only the backbone is replaced."""

    def loss(case: Case, loss_type: str, hidden: Tensor, weight: Tensor) -> Tensor:
        how = dict(temperature=case.temperature, beta=case.kl_coef, epsilon=CLIP)
        how |= dict(loss_type=loss_type, gradient_accumulation_steps=case.parts)
        how |= dict(max_completion_length=case.budget, **case.trl_options)
        trainer = trl_trainer(model, folder, **how)
        trainer.current_gradient_accumulation_steps = case.parts  # its training loop sets it
        backbone, lm = Given(), trainer.model
        head = SimpleNamespace(weight=weight, bias=None)
        lm.model, lm.get_output_embeddings = backbone, lambda: head
        total = 0.0
        for part in case.split(hidden):
            prompt = torch.ones_like(part.target_BL[:, :1])
            padding = torch.zeros_like(part.hidden_BLD[:, :1])
            backbone.hidden = torch.cat([part.hidden_BLD, padding], dim=1)
            inputs = {
                **dict(prompt_ids=prompt, prompt_mask=prompt, completion_ids=part.target_BL),
                **dict(completion_mask=part.mask_BL.long(), advantages=part.advantage_B),
                "num_items_in_batch": case.mask_BL.sum(),
            }
            inputs |= {} if part.old_BL is None else {"old_per_token_logps": part.old_BL}
            inputs |= {} if part.ref_BL is None else {"ref_per_token_logps": part.ref_BL}
            total = total + trainer.compute_loss(lm, inputs)
        return total

    return loss


def liger_loss(case: Case, loss_type: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger's fused loss. It knows no micro-batches: its caller divides by their number, unless
    told the tokens of all."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    how = dict(epsilon_low=CLIP, epsilon_high=CLIP, temperature=case.temperature, compiled=False)
    how |= dict(loss_type=loss_type, max_completion_length=case.budget)
    how |= dict(beta=case.kl_coef, use_ref_model=bool(case.kl_coef))
    function = LigerFusedLinearGRPOLoss(**how)
    total = 0.0
    for part in case.split(hidden):
        inputs = part.hidden_BLD, weight, part.target_BL, part.mask_BL.long(), part.advantage_B
        others = dict(old_per_token_logps=part.old_BL, ref_per_token_logps=part.ref_BL)
        tokens = case.mask_BL.sum() if loss_type == "dapo" else None
        loss, *_ = function(*inputs, **others, num_items_in_batch=tokens)
        total = total + (loss if loss_type == "dapo" else loss / case.parts)
    return total


def differentiate(
    loss: Callable, case: Case, loss_type: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Loss, d loss / d hidden, d loss / d weight."""
    given = case.hidden_BLD, case.weight_VD
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in given)
    value = loss(case, loss_type, hidden, weight)
    dhidden, dweight = torch.autograd.grad(value, (hidden, weight))
    return {"loss": value.detach(), "dhidden": dhidden, "dweight": dweight}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|, Euclidean norms."""
    return ((value.double() - exact).norm() / exact.norm()).item()


def relative_errors(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(values[name], x) for name, x in exact.items()}


def measure_loss(model: str, folder: Path) -> list[dict]:
    """A row per case and loss type: contender -> relative errors against float64."""
    losses = {"ours": our_loss, "TRL": trl_loss(model, str(folder / "loss")), "Liger": liger_loss}
    rows = []
    for (name, case), loss_type in product(make_cases().items(), LOSSES):
        exact = differentiate(formula, case, loss_type, torch.float64)
        errors = {}
        for contender, loss in losses.items():
            errors[contender] = relative_errors(differentiate(loss, case, loss_type), exact)
        rows.append({"case": name, "loss_type": loss_type, "errors": errors})
    return rows


ADVANTAGES = (  # title, our objective, TRL's loss type and what is set beside it
    ("dr_grpo, scale_rewards none", "drgrpo", dict(loss_type="dr_grpo", scale_rewards="none")),
    ("dr_grpo, default scale_rewards", "drgrpo", dict(loss_type="dr_grpo")),
    ("grpo, scale_rewards group", "grpo", dict(loss_type="grpo", scale_rewards="group")),
)


def measure_advantages(model: str, folder: Path) -> list[dict]:
    """Relative errors of TRL's advantages of one group and of ours, against r - mean r in float64,
    for grpo divided by the std."""
    reward_G = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    centred_G = reward_G.double() - reward_G.double().mean()
    inputs = [{"prompt": "0", "answer": r} for r in reward_G.tolist()]
    ids = [[1]] * len(reward_G)
    generated = (ids, ids, None, ["0"] * len(ids), None, {}, None, None)
    rows = []
    for title, algo, arguments in ADVANTAGES:
        exact_G = centred_G / (reward_G.double().std() if algo == "grpo" else 1.0)
        trainer = trl_trainer(model, str(folder / "advantage"), **arguments)
        trainer._generate = lambda prompts: generated
        trl_G = trainer._generate_and_score_completions(inputs)["advantages"]
        errors = {
            "TRL": relative_error(trl_G, exact_G),
            "ours": relative_error(group_advantage(reward_G[None], algo)[0], exact_G),
        }
        rows.append({"case": title} | errors)
    return rows


WHY = """\
Relative errors of loss / d hidden / d weight against float64, bold beyond float32's tolerance.
Where they are bold:
- KL, ours but for dr_grpo: our KL term is always divided by B C, so train.py refuses --kl-coef
  with these objectives.
- KL, TRL's default: it multiplies the KL term by the ratio (`use_bias_correction_kl`,
  DeepSeek-V3.2), another objective.
- bnpo in micro-batches, TRL and Liger: every micro-batch is averaged over its own tokens, as TRL
  documents, so that the gradient depends on the split. Ours is averaged over the tokens of the
  optimizer step.
- advantages, TRL: the loss type alone leaves the division by the std in place, and TRL adds 1e-4
  to the std (ours: 1e-8)."""


def loss_table(rows: list[dict]) -> str:
    """Markdown."""
    cells = []
    for row in rows:
        cells.append([row["case"], row["loss_type"], *map(error_cell, row["errors"].values())])
    return markdown(["case", "loss", *rows[0]["errors"]], cells)


def error_cell(errors: dict[str, float]) -> str:
    text = " / ".join(f"{errors[name]:.0e}" for name in ("loss", "dhidden", "dweight"))
    return f"**{text}**" if max(errors.values()) > TOLERANCE else text


def advantage_table(rows: list[dict]) -> str:
    """Markdown."""
    cells = [[row["case"], f"{row['TRL']:.0e}", f"{row['ours']:.0e}"] for row in rows]
    return markdown(["advantages of a group", "TRL", "ours"], cells)
