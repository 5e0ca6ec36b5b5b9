"""GPUs by name, and the sizes of the recipes' models. Imports no torch."""

import re
from dataclasses import dataclass

from drgrpo.types import UserError, check_name

CARDS = {
    "RTX4090-24GB": 23.5,
    "L40S-48GB": 44.4,
    "A100-40GB": 39.4,
    "A100-80GB": 79.1,
    "H100-80GB": 79.1,
    "H200-141GB": 139.7,
    "B200-180GB": 178.3,
}
"""GiB of each card as the driver reports them, the smallest value that is known. The source is the
"total capacity" of PyTorch's out-of-memory messages in public issues."""

MODELS = {
    "smol": ("llama", 49_152, 576, 1536, 30, 9, 3, 8192, True),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 151_936, 896, 4864, 24, 14, 2, 32_768, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 151_936, 896, 4864, 24, 14, 2, 32_768, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, 131_072, True),
    "Qwen/Qwen2.5-Math-1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, 4096, True),
    "Qwen/Qwen2.5-Math-7B": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 4096, False),
    "lkevinzc/Llama-3.2-3B-NuminaQA": ("llama", 128_256, 3072, 8192, 28, 24, 8, 131_072, True),
}
"""Name of `--model` -> the `FIELDS` of its config.json."""

FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Machine:
    """`count` GPUs of one kind, and as many processes."""

    count: int
    card: str

    @property
    def gpu_bytes(self) -> int:
        """memory of one GPU"""
        return int(CARDS[self.card] * 2**30)

    def __str__(self) -> str:
        return f"{self.count}x{self.card}"


def parse_machine(text: str) -> Machine:
    """A machine from `8xA100-80GB`. UserError offers the nearest card."""
    match = re.fullmatch(r"(\d+)x(.+)", text)
    if not match or not int(match[1]):
        raise UserError(
            f"--rehearse {text} must be a number of GPUs and a card, as in 8xA100-80GB; there are "
            f"{', '.join(CARDS)}"
        )
    check_name("card", match[2], CARDS)
    return Machine(int(match[1]), match[2])


def known_sizes(model: str) -> dict[str, object] | None:
    """Fields of the config of a model in `MODELS`, or None."""
    values = MODELS.get(model)
    return dict(zip(FIELDS, values, strict=True)) if values else None
