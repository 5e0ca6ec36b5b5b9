"""The start of the `tiny` recipe: a Qwen2 of 0.1 M parameters that has imitated flawed solutions.

RL needs a start that is sometimes right. The model is cached under a hash of all that it depends
on, so that the next run begins with RL.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from filelock import FileLock
from transformers import Qwen2Config, Qwen2ForCausalLM

from drgrpo import distributed
from drgrpo.model import Objective, load_policy
from drgrpo.pack import Sequence, pack
from drgrpo.templates import encode, get_template
from drgrpo.tiny import arithmetic, tokenizer

if TYPE_CHECKING:
    from drgrpo.config import Config

CACHE = Path("runs/warmup")


@dataclass(frozen=True, kw_only=True)
class Warmup:
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


def tiny_model(config: Config, log: Callable[[str], None]) -> str:
    """The Hugging Face folder of the warmed-up model for `config.seed`. Rank 0 makes it and the
    other processes read it."""
    with distributed.rank_zero_first():
        return str(cached_tiny_model(Warmup(seed=config.seed), CACHE, log))


def cached_tiny_model(
    config: Warmup, folder: str | Path, log: Callable[[str], None] = print
) -> Path:
    """The Hugging Face folder of the warmed-up model, in the cache `folder`. A model that is not in
    the cache is trained now, in about 40 seconds."""
    path = Path(folder) / f"tiny-seed{config.seed}-{_cache_key(config)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # a second run that starts meanwhile waits for the model
        if path.exists():
            log(f"warm-up: from the cache, {path}")
            return path
        partial = path.with_name(path.name + ".partial")
        build_tiny_model(config, partial)
        train(config, partial, log)
        partial.rename(path)  # a killed warm-up leaves no half-trained model under the final name
    return path


def _cache_key(config: Warmup) -> str:
    files = (arithmetic.__file__, tokenizer.__file__, __file__)
    sources = [Path(file).read_text() for file in files]
    inputs = json.dumps([asdict(config), torch.__version__, transformers.__version__, *sources])
    return hashlib.sha256(inputs.encode()).hexdigest()[:12]


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


def train(config: Warmup, path: Path, log: Callable[[str], None] = print) -> None:
    """Imitate the demonstrator and overwrite the model at `path`. A log-likelihood step is an
    on-policy policy-gradient step with advantage 1, so the loss is the one of RL."""
    tok = tokenizer.byte_tokenizer()
    cpu = torch.device("cpu")
    policy = load_policy(str(path), Objective(), dtype=torch.float32, device=cpu, kernel="torch")
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    problems = arithmetic.problems("train")
    prompts = {p.id: encode(get_template("arithmetic"), p.question, tok) for p in problems}
    demonstrator = arithmetic.Demonstrator(config.seed, config.notices)
    rng = random.Random(config.seed)

    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / config.lr_warmup, 1 - step / config.steps)
        chosen = [rng.choice(problems) for _ in range(config.batch)]
        texts = [demonstrator.solve(p) + tokenizer.EOS for p in chosen]
        responses = tok(texts).input_ids
        sequences = [
            Sequence(prompts[p.id], ids, [0.0] * len(ids), advantage=1.0)
            for p, ids in zip(chosen, responses, strict=True)
        ]
        batch = pack(sequences)
        loss, stats = policy.loss(batch, scale=1 / len(batch.target_N))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            nll = -stats["logprob"].mean().item()
            log(f"warm-up {step + 1:4d}/{config.steps}  nll/token {nll:.4f}")
    policy.lm.save_pretrained(path)
