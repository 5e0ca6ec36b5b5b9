"""A tiny policy, partly competent: a Qwen2 built from a config, which imitates flawed
demonstrations for a minute.

RL needs a start that is sometimes right. The result is kept under a hash of everything that it
depends on, so that the next run begins with RL.
"""

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from drgrpo.model import Objective, load_policy
from drgrpo.pack import pack
from drgrpo.templates import encode, get_template
from drgrpo.tiny import arithmetic, tokenizer


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """The supervised phase. `initializer_range` 0.08 matters: at this width the usual 0.02 starts
    too close to zero and learns slowly."""

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
    notices: bool = (
        True  # whether the demonstrator sees that he is wrong: see arithmetic.Demonstrator
    )


def cached_tiny_model(config: Warmup, cache_dir: str | Path, report=print) -> Path:
    """The Hugging Face folder of the warmed-up model, trained now if it is not in the cache."""
    sources = [Path(module.__file__).read_text() for module in (arithmetic, tokenizer)] + [
        Path(__file__).read_text()
    ]
    inputs = json.dumps([asdict(config), torch.__version__, transformers.__version__, *sources])
    path = (
        Path(cache_dir)
        / f"tiny-seed{config.seed}-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}"
    )
    if path.exists():
        report(f"warm-up: from the cache, {path}")
        return path
    partial = path.with_name(path.name + ".partial")
    build_tiny_model(config, partial)
    train(config, partial, report)
    partial.rename(path)  # a killed warm-up leaves no half-trained model under the final name
    return path


def build_tiny_model(config: Warmup, path: str | Path) -> None:
    """Random weights from `config.seed`, with the byte-level tokenizer, as a Hugging Face
    folder."""
    tok = tokenizer.byte_tokenizer()
    shape = {
        k: v
        for k, v in asdict(config).items()
        if hasattr(Qwen2Config, k) or k in Qwen2Config().to_dict()
    }
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


def train(config: Warmup, path: Path, report=print) -> None:
    """Imitate the demonstrator and overwrite the model at `path`. A log-likelihood step is an
    on-policy policy-gradient step with advantage 1, so the loss is the one that RL uses."""
    tok = tokenizer.byte_tokenizer()
    policy = load_policy(
        str(path), dtype=torch.float32, device=torch.device("cpu"), attention="sdpa", kernel="torch"
    )
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    problems = arithmetic.problems("train")
    prompts = {p.id: encode(get_template("arithmetic"), p.question, tok) for p in problems}
    demonstrator, rng = (
        arithmetic.Demonstrator(config.seed, config.notices),
        random.Random(config.seed),
    )

    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / config.lr_warmup, 1 - step / config.steps)
        chosen = [rng.choice(problems) for _ in range(config.batch)]
        solutions = [[*tok(demonstrator.solve(p)).input_ids, tok.eos_token_id] for p in chosen]
        batch = pack(
            [
                (prompts[p.id], s, [0.0] * len(s), 1.0)
                for p, s in zip(chosen, solutions, strict=True)
            ]
        )
        loss, stats = policy(batch, Objective(), scale=1 / len(batch.target_N))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            report(
                f"warm-up {step + 1:4d}/{config.steps}  nll/token {-stats['logprob'].mean().item():.4f}"
            )
    policy.lm.save_pretrained(path)
