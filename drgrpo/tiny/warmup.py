"""The model of the `tiny` recipe: a Qwen2 of 0.1 M parameters that imitated flawed solutions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from drgrpo import imitation
from drgrpo.pack import Sequence
from drgrpo.templates import encode, get_template
from drgrpo.tiny import arithmetic, tokenizer

if TYPE_CHECKING:
    from drgrpo.config import Config


@dataclass(frozen=True, kw_only=True)
class Warmup(imitation.Schedule):
    """The supervised phase. `initializer_range` matters at this width: the usual 0.02 starts too
    close to zero and learns slowly. `notices`: see `arithmetic.Demonstrator`."""

    seed: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    intermediate_size: int = 192
    max_position_embeddings: int = 1024
    initializer_range: float = 0.08
    steps: int = 800
    batch: int = 64
    lr: float = 3e-3
    lr_warmup: int = 50
    notices: bool = True


def tiny_model(config: Config, log: Callable[[str], None]) -> Path:
    """The Hugging Face folder of the warmed-up model for `config.seed`."""
    return cached_tiny_model(Warmup(seed=config.seed), imitation.CACHE, log)


def cached_tiny_model(
    config: Warmup, folder: str | Path, log: Callable[[str], None] = print
) -> Path:
    """The Hugging Face folder of the warmed-up model, in the cache `folder`. A model that is not in
    the cache is trained now, in about 40 seconds."""
    files = (arithmetic.__file__, tokenizer.__file__, imitation.__file__, __file__)
    inputs = [asdict(config), *(Path(file).read_text() for file in files)]

    def make(path: Path) -> None:
        build_tiny_model(config, path)
        imitation.imitate(path, config, demonstrations(config), log)

    return imitation.cached(f"tiny-seed{config.seed}", inputs, folder, make, log)


def build_tiny_model(config: Warmup, path: str | Path) -> None:
    """Write a Hugging Face folder with random weights from `config.seed` and the byte-level
    tokenizer."""
    tok = tokenizer.byte_tokenizer()
    qwen2 = Qwen2Config().to_dict()
    shape = {name: value for name, value in asdict(config).items() if name in qwen2}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **shape,
                vocab_size=len(tok),
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tok.eos_token_id,
                pad_token_id=tok.pad_token_id,
            )
        )
    model.save_pretrained(path)
    tok.save_pretrained(path)


def demonstrations(config: Warmup) -> Iterator[list[Sequence]]:
    """Batches of solutions by the demonstrator, whose flaws RL is to mend."""
    tok = tokenizer.byte_tokenizer()
    problems = arithmetic.problems("train")
    prompts = {p.id: encode(get_template("arithmetic"), p.question, tok) for p in problems}
    demonstrator = arithmetic.Demonstrator(config.seed, config.notices)
    rng = random.Random(config.seed)
    while True:
        chosen = [rng.choice(problems) for _ in range(config.batch)]
        responses = tok([demonstrator.solve(p) + tokenizer.EOS for p in chosen]).input_ids
        pairs = zip(chosen, responses, strict=True)
        yield [imitation.demonstration(prompts[p.id], ids) for p, ids in pairs]
