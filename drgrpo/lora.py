"""LoRA (Hu et al., arXiv 2106.09685): a frozen base model and a trainable update of low rank.

    y = x W^T + s (x A^T) B^T        W [out, in], A [r, in], B [out, r] = 0 at first, s = alpha / r

`peft` puts A and B beside the linear layers of the blocks. Embedding, norms and LM head stay as
they are. The base has the compute type, A and B are float32 master weights.

The sampler gets one weight, W + s B A. It is computed in float32 from A and B as the trainer's
forward pass sees them, and then rounded to the compute type. The trainer keeps x W^T and the update
apart, so that this rounding comes on top of those of full training: docs/lora.md measures it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from drgrpo.types import Batch, UserError, check_name, comma_list

if TYPE_CHECKING:
    from drgrpo.model import Policy

ALL = "all-linear"
BASE, FACTOR_A, FACTOR_B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Adapter:
    """`rank` r, `alpha` with s = alpha / r, and the linear layers' names between commas, or
    "all-linear". A is drawn from `seed`. Rank 0 is no adapter: every weight is trained."""

    rank: int = 0
    alpha: int = 32
    targets: str = ALL
    seed: int = 0


NO_ADAPTER = Adapter()


def add_adapter(lm: PreTrainedModel, adapter: Adapter) -> None:
    """Freeze the model and put trainable factors into its blocks. It computes what it did before.
    UserError as `target_layers`."""
    from peft import LoraConfig, inject_adapter_in_model  # a second that only LoRA pays

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=target_layers(lm, adapter),
        task_type="CAUSAL_LM",
        base_model_name_or_path=lm.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):  # every process draws the same factors
        torch.manual_seed(adapter.seed)
        inject_adapter_in_model(config, lm)


def target_layers(lm: PreTrainedModel, adapter: Adapter) -> list[str]:
    """The names of the linear layers that get an adapter. `lm` needs no weights.

    UserError for a target that no block has, and for a rank above the width of a target."""
    width = linear_widths(lm)
    names = list(width) if adapter.targets == ALL else comma_list(adapter.targets)
    for name in names or [adapter.targets]:
        check_name("--lora-targets", name, [ALL, *width])
    narrowest = min(names, key=lambda name: width[name])
    if adapter.rank > width[narrowest]:
        raise UserError(
            f"--lora-rank {adapter.rank} exceeds the width of {narrowest}, which is "
            f"{width[narrowest]}; use at most that, or leave {narrowest} out of --lora-targets"
        )
    return names


def linear_widths(lm: PreTrainedModel) -> dict[str, int]:
    """The linear layers of a block: name -> the smaller one of its two widths."""
    modules = lm.base_model.layers[0].named_modules()
    linear = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    return {name.rpartition(".")[2]: min(module.weight.shape) for name, module in linear}


def merged_weights(
    state: dict[str, Tensor], adapter: Adapter, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, unsharded, in `dtype`, one at a time.

    `state` is the model's state_dict. Without an adapter its weights are only cast. Under FSDP2
    this is a collective."""
    for name, tensor in state.items():
        if name.endswith((FACTOR_A, FACTOR_B)):
            continue
        weight = whole(tensor, dtype)
        layer = name.removesuffix(f"{BASE}weight")
        if layer != name:
            factor_A, factor_B = (whole(state[layer + f], dtype) for f in (FACTOR_A, FACTOR_B))
            update = factor_B.float() @ factor_A.float()
            weight = weight.float().add(update, alpha=adapter.alpha / adapter.rank).to(dtype)
        yield name.replace(BASE, "."), weight


def whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`, gathered from the processes that share it."""
    # The cast comes first: it halves the bytes to gather, and FSDP2 rounds the same way.
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class WithoutAdapter:
    """The base model of a policy: the reference model of a KL penalty, without a second copy."""

    policy: "Policy"

    def logprob(self, batch: Batch) -> Tensor:
        """As `Policy.logprob`, with s = 0."""
        from peft.helpers import rescale_adapter_scale

        with rescale_adapter_scale(self.policy.lm, 0.0):
            return self.policy.logprob(batch)


def reference_model(policy: "Policy", load: Callable[[], "Policy"]) -> "Policy | WithoutAdapter":
    """The initial policy, for a KL penalty. `load` makes a second copy where there is no base."""
    return WithoutAdapter(policy) if policy.adapter.rank else load().requires_grad_(False)


def save_adapter(lm: PreTrainedModel, path: Path, write: bool) -> None:
    """The adapter alone in the format of `peft.PeftModel.from_pretrained`, in float32. Collective.
    The process with `write` writes."""
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    factors = get_peft_model_state_dict(lm, save_embedding_layers=False)
    gathered = {name: whole(factor, torch.float32).cpu() for name, factor in factors.items()}
    if write:
        lm.peft_config["default"].save_pretrained(path)
        prefixed = {f"base_model.model.{name}": factor for name, factor in gathered.items()}
        save_file(prefixed, path / SAFETENSORS_WEIGHTS_NAME)
