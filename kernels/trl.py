"""The fused head in TRL's GRPOTrainer, in five lines:

    from drgrpo.kernels.trl import DrGRPOTrainer
    from trl import GRPOConfig

    args = GRPOConfig(loss_type="dr_grpo", scale_rewards="none")
    DrGRPOTrainer("Qwen/Qwen2.5-1.5B", reward, args, train_dataset=data).train()

`DrGRPOTrainer` computes the loss of Dr. GRPO and its gradients in one pass over the logits: three
GEMMs. `use_fused_head()` keeps TRL's trainer and any of its losses, and replaces only the function
that computes log-probs: four GEMMs, as many as TRL's own.

TRL calls `trl.trainer.utils._ChunkedLogProbFunction` for every log-prob. The name is private, and
`DrGRPOTrainer` replaces `GRPOTrainer._compute_loss`. Another version of TRL may have settings that
this module does not know. It therefore accepts the version it was written for and no other.

B responses, L tokens of the longest one, N positions that TRL scores, T tokens that are trained on.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from drgrpo.kernels.linear_drgrpo import LogitsDtype, linear_drgrpo_loss, linear_logprob

TRL = "1.16"
"""The version of TRL that this module is written for."""


def check_version(found: str) -> None:
    """Raises ImportError if `found` is another version of TRL."""
    if found.split(".")[:2] != TRL.split("."):
        raise ImportError(
            f"drgrpo.kernels.trl replaces private functions of TRL {TRL}, and TRL {found} is "
            f"installed: pip install trl=={TRL}.0"
        )


try:
    import trl
except ImportError as error:
    raise ImportError(
        f"drgrpo.kernels.trl needs TRL, which is not installed: pip install trl=={TRL}.0"
    ) from error
check_version(trl.__version__)

from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

# ---- TRL's own loss


class _Hook:
    """Stands in for TRL's function from its creation on, or inside a `with`. `head` takes hidden
    [N, D], weight [V, D], target [N] and the temperature, and returns log-probs and entropies [N],
    None for entropies that nobody reads."""

    def __init__(self, head: Callable[[Tensor, Tensor, Tensor, float], tuple]) -> None:
        self.head = head
        self._before = utils._ChunkedLogProbFunction
        utils._ChunkedLogProbFunction = self

    def __enter__(self) -> "_Hook":
        return self

    def __exit__(self, *_: object) -> None:
        utils._ChunkedLogProbFunction = self._before

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple:
        """TRL's call."""
        check_head(bias, softcap, logit_scale, outputs)
        return *self.head(hidden, weight, target, temperature), None, None, None


def use_fused_head(logits_dtype: torch.dtype | Literal["shifted"] = torch.float32) -> _Hook:
    """TRL's trainers compute log-probs and entropies with the fused head from this call on. Inside
    `with use_fused_head():` they do so to the end of the block.

    `logits_dtype` is that of `linear_drgrpo_loss`. The log-probs and their gradient are computed
    from the same logits.

    A model whose head has a bias, a soft-cap or a scale raises ValueError in its first forward
    pass. The entropy has no gradient: `entropy_coef` raises RuntimeError in the backward pass."""

    def head(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple:
        return _LogProb.apply(hidden, weight, target, temperature, logits_dtype)

    return _Hook(head)


def check_head(
    bias: Tensor | None, softcap: float | None, logit_scale: float, outputs: tuple[str, ...]
) -> None:
    """Raises ValueError for what TRL's head computes and the fused head does not."""
    others = sorted(set(outputs) - {"log_probs", "entropy"})
    refused = {
        "a bias": bias is not None,
        f"final_logit_softcapping ({softcap})": softcap is not None,
        f"a scale of the logits ({logit_scale})": logit_scale != 1,
        f"the outputs {others}": bool(others),
    }
    for name, is_asked_for in refused.items():
        if is_asked_for:
            raise ValueError(
                f"the fused head does not compute {name}: train this model with TRL's own head, "
                "without drgrpo.kernels.trl"
            )


class _LogProb(torch.autograd.Function):
    """(log-prob, entropy) of each token, fp32 [N]. The gradient of sum_t g_t logp_t is that of the
    on-policy loss with the advantages -g."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        logits_dtype: LogitsDtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, target)
        ctx.options = {"temperature": temperature, "logits_dtype": logits_dtype}
        # The backward pass runs outside the caller's autocast.
        device = hidden.device.type
        ctx.autocast = {"device_type": device, "enabled": torch.is_autocast_enabled(device)}
        ctx.autocast["dtype"] = torch.get_autocast_dtype(device)
        return linear_logprob(hidden, weight.to(hidden.dtype), target, **ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        if grad_entropy is not None:
            raise RuntimeError(
                "the fused head has no gradient of the entropy: set entropy_coef=0 and "
                "use_adaptive_entropy=False, or train without drgrpo.kernels.trl"
            )
        if grad is None:
            return (None,) * 5
        hidden, weight, target = ctx.saved_tensors
        gathered = utils.maybe_gather_lm_head_ctx(weight, None)  # of DeepSpeed's ZeRO-3
        with gathered, torch.enable_grad(), torch.autocast(**ctx.autocast):
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
            weight = weight.detach().requires_grad_(ctx.needs_input_grad[1])
            inputs = hidden, weight.to(hidden.dtype), target, -grad.float()
            loss, _ = linear_drgrpo_loss(*inputs, **ctx.options)
            loss.backward()
        return hidden.grad, weight.grad, None, None, None


# ---- the loss of Dr. GRPO in one pass

SETTINGS = {
    "loss_type": "dr_grpo",
    "importance_sampling_level": "token",
    "delta": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}
"""Fields of GRPOConfig that enter TRL's loss, and the value that `DrGRPOTrainer` computes."""


def check_settings(args: GRPOConfig | None) -> None:
    """Raises ValueError for settings of the loss that `DrGRPOTrainer` does not have."""
    if args is None:
        raise ValueError("DrGRPOTrainer needs args=GRPOConfig(loss_type='dr_grpo')")
    # TRL's default multiplies the KL term by the ratio, which is another objective.
    kl = {"use_bias_correction_kl": False} if args.beta != 0 else {}
    for name, value in (SETTINGS | kl).items():
        found = getattr(args, name)
        if found != value:
            raise ValueError(
                f"{name} ({found!r}): DrGRPOTrainer computes {name}={value!r} only. Set it in "
                "GRPOConfig, or use TRL's GRPOTrainer after use_fused_head()"
            )


class DrGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the loss of Dr. GRPO and its gradients from one pass over the logits.

    The loss is that of `loss_type="dr_grpo"`: the sum over tokens, divided by the responses of the
    micro-batch, `max_completion_length` and the accumulation steps. TRL's metrics keep their names.
    The paper's advantages take `scale_rewards="none"`.

    `logits_dtype` is that of `linear_drgrpo_loss`. Raises ValueError for settings of the loss that
    `check_settings` names, models of images and the load-balancing loss of experts."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        logits_dtype: LogitsDtype = None,
        **options: Any,
    ) -> None:
        check_settings(args)
        super().__init__(model, reward_funcs, args, *others, **options)
        self.logits_dtype = logits_dtype
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef ({self.router_aux_loss_coef}): DrGRPOTrainer has no "
                "load-balancing loss. Set it to 0 in GRPOConfig"
            )
        if self._is_vlm:
            raise ValueError("DrGRPOTrainer trains on text: pass a tokenizer, not a processor")

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> tuple:
        """Log-probs that the loss compares with its own come from the same head."""
        with use_fused_head(self.logits_dtype or torch.float32):
            return super()._get_per_token_logps_and_entropies(*args, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        scored_BL = inputs["completion_mask"].bool()
        head = _OnePass(
            inputs,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            kl_coef=self.beta,
            scale=1 / (len(scored_BL) * self.max_completion_length * self._accumulation_steps()),
            logits_dtype=self.logits_dtype,
        )
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with _Hook(head):
            loss_BL, *_ = super()._get_per_token_logps_and_entropies(
                model, tokens, attended, scored_BL.shape[1]
            )
        self._log_metrics(head)
        return loss_BL.take(scored_BL.int().argmax())

    def _accumulation_steps(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _log_metrics(self, head: "_OnePass") -> None:
        stats, mask_BL = head.stats, head.mask_BL
        ratio_T, advantage_T = stats["log_ratio"].exp(), head.advantage_BL[mask_BL]
        low_T = (ratio_T < 1 - self.epsilon_low) & (advantage_T < 0)
        high_T = (ratio_T > 1 + self.epsilon_high) & (advantage_T > 0)
        means = {
            "entropy": stats["entropy"],
            "clip_ratio/low_mean": low_T,
            "clip_ratio/high_mean": high_T,
            "clip_ratio/region_mean": low_T | high_T,
        }
        if self.beta != 0:
            means["kl"] = stats["kl"]
        sums = torch.stack([x.sum().float() for x in (*means.values(), mask_BL)])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(means, sums, strict=True):
            metrics[name].append(total / max(count, 1.0))
        for name, cut_T, extreme in (
            ("low_min", low_T, utils.nanmin),
            ("high_max", high_T, utils.nanmax),
        ):
            cut_BL = torch.zeros_like(mask_BL).masked_scatter(mask_BL, cut_T)
            share_B = self.accelerator.gather(cut_BL.sum(1) / mask_BL.sum(1))
            metrics[f"clip_ratio/{name}"].append(extreme(share_B).item())


class _OnePass:
    """The loss of one micro-batch in the place of TRL's log-probs. It is computed inside the
    model's forward pass, where FSDP and ZeRO-3 have gathered the weight, and leaves as an output
    of the model, where their hooks see it: the value of every scored position is the loss."""

    stats: dict[str, Tensor]  # [T], of the tokens in mask_BL

    def __init__(self, inputs: dict[str, Tensor], **options: Any) -> None:
        self.options = options
        scored_BL = inputs["completion_mask"].bool()
        self.mask_BL = scored_BL & inputs.get("tool_mask", scored_BL).bool()
        # Positions predict the next token, so the last token of a prompt is the first of them.
        before = inputs["prompt_ids"].shape[1] - 1, 0
        self.scored, self.chosen = pad(scored_BL, before), pad(self.mask_BL, before)
        advantage = inputs["advantages"]  # [B], or [B, L] of a subclass
        self.advantage_BL = advantage.view(len(scored_BL), -1).expand_as(scored_BL)
        # min() commutes with the weight, which is not negative.
        weighted_BL = self.advantage_BL * inputs.get("importance_sampling_ratio", 1.0)
        self.per_token = {  # [B, L]
            "advantage": weighted_BL,
            "old_logprob": inputs.get("old_per_token_logps"),
            "ref_logprob": inputs.get("ref_per_token_logps"),
        }

    def __call__(
        self, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float
    ) -> tuple[Tensor, None]:
        # TRL gives the scored positions on devices with Triton, and all of them elsewhere.
        is_all = len(target) == self.scored.numel()
        chosen_N = self.chosen.flatten() if is_all else self.chosen[self.scored]
        per_token: dict[str, Any] = {  # [T]
            name: x if x is None else x[self.mask_BL] for name, x in self.per_token.items()
        }
        loss, self.stats = linear_drgrpo_loss(
            hidden[chosen_N],
            weight.to(hidden.dtype),
            target[chosen_N],
            **per_token,
            temperature=temperature,
            **self.options,
        )
        return loss.expand(len(target)), None
