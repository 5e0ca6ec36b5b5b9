"""What fits: a ledger of a process's GPU memory, and from it whether vLLM stays resident while the
trainer works."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from drgrpo.types import UserError

GIB = 2**30
USABLE = 0.92  # of a GPU: CUDA contexts, NCCL buffers and fragmentation take the rest


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """GiB per process. `kept` is there all the time, `training` only while training, `sampling`
    only while vLLM is awake."""

    kept: dict[str, float]
    training: dict[str, float]
    sampling: dict[str, float]
    gpu: float | None
    kv_cache: float
    sleep: bool

    def __str__(self) -> str:
        parts = [
            f"{name} {sum(items.values()):.2f} ({', '.join(f'{k} {v:.2f}' for k, v in items.items())})"
            for name, items in (
                ("kept", self.kept),
                ("training", self.training),
                ("sampling", self.sampling),
            )
        ]
        habit = "sleeps" if self.sleep else "stays"
        where = "no GPU" if self.gpu is None else f"of {self.gpu:.1f}, vLLM {habit} while training"
        return f"memory ledger, GiB per process (activations are estimates): {'; '.join(parts)}; {where}"


def make_ledger(
    lm: PretrainedConfig,
    parameters: int,
    *,
    shards: int,
    bytes_each: int,
    checkpointing: str,
    microbatch: int,
    max_tokens: int,
    sequences: int,
    tp: int,
    kv_cache_gb: float,
    sleep: str,
    gpu_bytes: int | None,
    reference: bool = False,
) -> Ledger:
    """The ledger of a causal LM with `parameters` weights.

    shards: processes that share master weights, gradients and Adam's moments; bytes_each: of a
    compute weight; microbatch, max_tokens, sequences: packed tokens of a pass, longest sequence,
    sequences sampled at once; gpu_bytes: None without a GPU; reference: a second model is kept for
    a KL penalty. `sleep` "auto" lets vLLM stay if everything fits beside half of the cache it
    wants. UserError if training or sampling alone does not fit."""
    head = lm.num_key_value_heads * (
        getattr(lm, "head_dim", None) or lm.hidden_size // lm.num_attention_heads
    )
    vocabulary = lm.vocab_size * lm.hidden_size
    block = (parameters - vocabulary * (1 if lm.tie_word_embeddings else 2)) / lm.num_hidden_layers
    wide = {
        "none": 6 * lm.hidden_size + 2 * head + 4 * lm.intermediate_size,
        "selective": 4 * lm.hidden_size + 2 * head + 2 * lm.intermediate_size,
        "full": lm.hidden_size,
    }
    activations = (
        microbatch * (lm.num_hidden_layers * wide[checkpointing] + wide["none"]) * bytes_each
    )
    kept = {"master weights": 4 * parameters / shards, "Adam": 8 * parameters / shards}
    if reference:
        kept["reference"] = 4 * parameters / shards
    training = {
        "gradients": 4 * parameters / shards,
        "gathered weights": bytes_each * (2 * vocabulary + 2 * block),
        "activations": activations,
        "LM head": 4 * vocabulary + 2 * 4096 * lm.vocab_size,
    }
    wanted = sequences * max_tokens * 2 * lm.num_hidden_layers * head * bytes_each
    weights = bytes_each * parameters / tp
    if gpu_bytes is None:
        asleep, cache = False, (kv_cache_gb or 0.25) * GIB
    else:
        room = USABLE * gpu_bytes - sum(kept.values()) - weights
        beside = room - sum(training.values())
        if min(room, USABLE * gpu_bytes - sum(kept.values()) - sum(training.values())) < 0.5 * GIB:
            raise UserError(
                f"{parameters / 1e9:.1f} B parameters on {shards} processes do not fit a GPU of {gpu_bytes / GIB:.0f} GiB: "
                f"{sum(kept.values()) / GIB:.0f} GiB for weights and Adam, then {sum(training.values()) / GIB:.0f} to train or "
                f"{weights / GIB:.0f} and a cache to sample; use more processes, fewer --dp-replicate, a smaller "
                "--tokens-per-microbatch or more --tp"
            )
        asleep = sleep == "on" or (sleep == "auto" and beside < wanted / 2)
        cache = kv_cache_gb * GIB or max(min(wanted, room if asleep else beside), 0.5 * GIB)
    gib = lambda items: {name: size / GIB for name, size in items.items()}  # noqa: E731
    sampling = {"vLLM weights": weights, "key-value cache": cache}
    return Ledger(
        kept=gib(kept),
        training=gib(training),
        sampling=gib(sampling),
        kv_cache=cache / GIB,
        sleep=asleep,
        gpu=None if gpu_bytes is None else gpu_bytes / GIB,
    )
