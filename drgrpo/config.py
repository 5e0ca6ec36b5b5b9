"""Every setting of the trainer, and the recipes.

A field is one flag of `train.py`, and the string under it is the flag's `--help`. A recipe is a
function that returns a `Config`. `--field value` overrides it. The object that is logged, saved
and compared on resume is the object that is used. This file imports no torch, so that a mistake
on the command line is answered at once.
"""

import inspect
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from drgrpo import reward
from drgrpo.run.cards import parse_machine
from drgrpo.run.cli import Parser, check_choices, check_texts, flag
from drgrpo.run.files import read_object
from drgrpo.templates import AnswerRule, get_template
from drgrpo.types import UserError, check_divides, check_name, check_path, world_size
from drgrpo.vllm_options import check_rounding

MAY_CHANGE_ON_RESUME = (
    *("out", "steps", "eval_every", "save_every", "keep", "max_hours", "resume", "parity"),
    *("tensorboard", "wandb", "push_to_hub", "watchdog_minutes", "dry_run", "attention", "kernel"),
    *("logits", "checkpointing", "compile", "dp_replicate", "tokens_per_microbatch", "sleep"),
    *("tp", "kv_cache_gb", "sampler_batch", "drop_zero_advantage", "batch_invariant"),
)
"""A resumed run may change these fields. They decide when and how things are computed, and what is
learned stays the same up to rounding."""

LORA_LR_FACTOR = 10
"""A recipe's `lr` is the one of full training. Without --lr, LoRA trains with this multiple of it.
"LoRA Without Regret" (Thinking Machines, 2025) finds the factor at alpha 32, for every rank, in RL
too. oat's LoRA example has 5e-5 at rank 1, where full training has 1e-6."""

TOKENS_WEIGHED = ("grpo", "grpo_length", "dapo", "lite_ppo", "cispo")
"""Objectives that do not divide by a constant: see `drgrpo.advantage.token_weight`."""

MASKS = ("icepop", "sequence_mask")
"""Objectives that leave out tokens by trainer and sampler's difference: `mismatch_weight`."""

Algo = Literal[
    "drgrpo",
    "grpo",
    "grpo_length",
    "grpo_std",
    "rloo",
    "dapo",
    "lite_ppo",
    "maxrl",
    "cispo",
    "icepop",
    "sequence_mask",
    "overlong_mask",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    recipe: str
    """name of the recipe that the other values start from"""
    out: str = ""
    """folder of the run (default: runs/RECIPE)"""
    seed: int = 0
    """seed of the warm-up, the data order and, with step, problem and sample, of every rollout"""

    # model
    model: str = ""
    """Hugging Face folder or hub name of the initial policy, or one that is made: `tiny`, of 0.1 M
    parameters, and `smol`, from SmolLM2-135M"""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """compute type of policy and sampler; master weights and optimizer state are float32"""
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = "auto"
    """packed attention: flash_attn (package), varlen (in PyTorch, CUDA only), sdpa (anywhere)"""
    kernel: Literal["auto", "triton", "torch"] = "auto"
    """backend of the fused LM head and loss; auto is triton on CUDA and torch elsewhere"""
    checkpointing: Literal["none", "selective", "full"] = "full"
    """activations recomputed in the backward pass: none, all but matmul outputs, or whole blocks"""
    compile: bool = False
    """torch.compile every block"""
    logits: Literal["auto", "float32", "shifted"] = "auto"
    """the LM head's: float32, or 16 bits about the target's logit (auto: on a GPU in 16 bits)"""

    # LoRA
    lora_rank: int = 0
    """train an adapter of this rank on a frozen model, see docs/lora.md; 0 trains every weight"""
    lora_alpha: int = 32
    """the adapter's output is multiplied by lora_alpha / lora_rank"""
    lora_targets: str = "all-linear"
    """linear layers that get an adapter: comma-separated names, such as q_proj,v_proj, or all"""

    # data
    train_data: str = ""
    """.jsonl, .json or .parquet file, `save_to_disk` folder, hub name `name[:split]`, named set"""
    eval_data: str = ""
    """comma-separated sources of the evaluation during training, each as for train_data"""
    problem_field: str = "problem"
    """column of the question"""
    answer_field: str = "answer"
    """column of the ground truth"""
    template: str = "qwen_math"
    """question -> prompt: a name in drgrpo/templates.py, a file, or a text with {q}"""
    system: str = ""
    """system message of --template chat"""
    answer: AnswerRule = "auto"
    """where the answer stands: see drgrpo/answers.py; auto is the template's own rule"""
    reward: str = "math"
    """math, FILE.py:FUNCTION, or a sum as `math + 0.2*FILE.py:FUNCTION`: see docs/rewards.md"""
    max_prompt_tokens: int = 1024
    """longer prompts are dropped, and counted"""

    # rollout
    engine: Literal["auto", "torch", "vllm"] = "auto"
    """sampler: vllm, or torch (plain PyTorch with a KV cache); auto is vllm on CUDA"""
    prompts_per_step: int = 128
    """P, prompts per rollout phase, over all processes"""
    group_size: int = 8
    """G, samples per prompt"""
    max_new_tokens: int = 3000
    """generation budget of a response, and the constant C that Dr. GRPO divides by"""
    temperature: float = 1.0
    """sampling temperature of rollouts; the trainer's log-probs use the same"""
    carry_over: float = 0.0
    """share of responses that a step leaves unfinished for the next one, see docs/carry_over.md"""
    carry_steps: int = 2
    """steps that a response is carried at most; the step after that waits for it"""
    sampler_batch: int = 256
    """sequences that a sampler runs at once, per process; --tp N makes it N times as many"""
    kv_cache_gb: float = 0.0
    """GB of vLLM's KV cache per process; 0: what the memory ledger leaves, or 0.25 without a GPU"""
    tp: int = 0
    """processes that share one vLLM engine; 0: the memory ledger decides by the model's size"""
    sleep: Literal["auto", "on", "off"] = "auto"
    """vLLM frees its memory during training (on), keeps it (off), or the memory ledger decides"""
    batch_invariant: bool = False
    """vLLM on a GPU: samples do not depend on their batch, not even by rounding; slower"""
    vllm: str = ""
    """further arguments of vLLM's LLM(...) as JSON, such as {"enforce_eager": true}"""
    speculate: Literal["none", "ngram"] = "none"
    """ngram: vLLM on a GPU drafts the end of a rollout from the text so far; exact in
    distribution, and no faster unless texts repeat themselves"""

    # algorithm
    algo: Algo = "drgrpo"
    """objective, see docs/objectives.md; grpo_length and grpo_std put one division of GRPO back"""
    minibatches: int = 8
    """optimizer steps per rollout phase"""
    clip_low: float = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: float = 0.2
    """see clip_low"""
    old_logprob: Literal["sampler", "recompute", "none"] = "recompute"
    """denominator of the ratio: log-probs of sampler or trainer (the paper), or none (ratio 1)"""
    tis_cap: float = 0.0
    """every token weighs min(old / sampler, tis_cap), 0: off; the bound of icepop, sequence_mask"""
    kl_coef: float = 0.0
    """weight of a KL penalty (k3) to the initial policy; the paper has none"""
    drop_zero_advantage: bool = True
    """skip responses whose advantage is zero in training; exact, they have no gradient"""

    # optimizer (AdamW)
    lr: float = 1e-6
    """learning rate, constant after warmup_steps; with LoRA, 10 times the recipe's if not given"""
    warmup_steps: int = 0
    """optimizer steps of linear warm-up"""
    beta1: float = 0.9
    """AdamW's first moment"""
    beta2: float = 0.95
    """AdamW's second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    max_grad_norm: float = 1.0
    """global gradient-norm clip"""
    tokens_per_microbatch: int = 16384
    """packed tokens of a forward and backward pass, per process; a longer sequence runs alone"""

    # processes
    dp_replicate: int = 1
    """HSDP: copies of the sharded model, such as one a node; 1 shards over all processes"""
    watchdog_minutes: float = 60.0
    """a longer phase ends the run, after every process has logged where it hangs; 0: never"""

    # run
    steps: int = 500
    """rollout phases"""
    eval_every: int = 16
    """steps between evaluations; also before the first and after the last step; 0: only those"""
    eval_samples: int = 0
    """samples per problem at the training temperature, in addition to the greedy answer"""
    save_every: int = 50
    """steps between checkpoints; also after the last step; 0: only then"""
    keep: int = 2
    """newest checkpoints that are kept"""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest intact checkpoint in --out; never: stop if --out has one"""
    max_hours: float = 0.0
    """save and stop after so many hours of this process, as on SIGTERM and SIGUSR1; 0: no limit"""
    parity: Literal["stop", "warn"] = "stop"
    """what to do when the log-probs of trainer and sampler differ: see drgrpo/parity.py"""
    tensorboard: bool = False
    """write the metrics to OUT/tensorboard too"""
    wandb: str = ""
    """Weights & Biases project to write the metrics to"""
    push_to_hub: str = ""
    """hub name to upload OUT/hf to at the end; a new repository is private, see docs/report.md"""
    dry_run: bool = False
    """train on the longest possible micro-batch, log memory and projected hours, and stop"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_texts(self)
        self._check_numbers()
        self._check_ranges()
        get_template(self.template, self.answer, self.system)
        check_rounding(self.vllm, self.tis_cap)
        if self.group_size < 2:
            raise UserError(
                "--group-size 1 leaves no group to compare with, and every advantage would be 0; "
                "use 2 or more"
            )
        if self.rollouts_per_step % self.minibatches:
            nearest = nearest_divisors(self.rollouts_per_step, self.minibatches)
            raise UserError(
                f"{self.rollouts_per_step} rollouts per step (--prompts-per-step "
                f"{self.prompts_per_step} x --group-size {self.group_size}) do not divide into "
                f"--minibatches {self.minibatches}; try --minibatches {' or '.join(nearest)}"
            )
        if self.old_logprob == "none" and self.minibatches > 1:
            raise UserError(
                "--old-logprob none is exact only with one update per rollout, not with "
                f"--minibatches {self.minibatches}; use --minibatches 1, or --old-logprob sampler "
                "or recompute"
            )
        if self.speculate != "none" and self.batch_invariant:
            raise UserError(
                f"--speculate {self.speculate} lets a sample depend on how many others are still "
                "being sampled, which --batch-invariant excludes; leave one of the two out"
            )
        if self.logits == "shifted" and self.dtype == "float32":
            raise UserError(
                "--logits shifted rounds to the 16 bits of --dtype bfloat16 or float16, and "
                "--dtype is float32; use --logits auto"
            )
        if self.carry_over and self.old_logprob != "sampler":
            raise UserError(
                f"--carry-over {self.carry_over} with --old-logprob {self.old_logprob}: responses "
                "that were carried over are from older weights, and only the sampler's log-probs "
                "correct for that; add --old-logprob sampler, or leave --carry-over out"
            )
        self._check_algo()

    def _check_algo(self) -> None:
        if self.kl_coef and self.algo in TOKENS_WEIGHED:
            raise UserError(
                f"--kl-coef {self.kl_coef} with --algo {self.algo}: the penalty is divided by "
                "B x max_new_tokens and this objective divides its tokens otherwise, so that the "
                "penalty's weight would differ from yours; use drgrpo, grpo_std or rloo"
            )
        if self.masks_mismatch and self.old_logprob != "recompute":
            raise UserError(
                f"--algo {self.algo} compares log-probs of trainer and sampler, and --old-logprob "
                f"{self.old_logprob} leaves the trainer's out; use --old-logprob recompute"
            )
        if self.masks_mismatch and self.tis_cap <= 1:
            raise UserError(
                f"--algo {self.algo} keeps ratios from 1 / --tis-cap to --tis-cap, and --tis-cap "
                f"is {self.tis_cap:g}; use a value above 1, such as 5"
            )
        if self.algo == "cispo" and self.tis_cap:
            raise UserError(
                f"--tis-cap {self.tis_cap:g} with --algo cispo, whose own weight is already "
                "min(ratio, 1 + clip_high); leave --tis-cap out"
            )

    def _check_numbers(self) -> None:
        positive = (
            *("prompts_per_step", "group_size", "max_new_tokens", "max_prompt_tokens", "steps"),
            *("minibatches", "tokens_per_microbatch", "sampler_batch", "temperature", "lr"),
            *("max_grad_norm", "lora_alpha", "dp_replicate", "keep", "carry_steps"),
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be a positive number")

    def _check_ranges(self) -> None:
        from_zero = (
            *("seed", "clip_low", "clip_high", "tis_cap", "kl_coef", "weight_decay"),
            *("warmup_steps", "eval_every", "eval_samples", "save_every"),
            *("tp", "kv_cache_gb", "max_hours", "watchdog_minutes", "lora_rank"),
        )
        for name in from_zero:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"--{flag(name)} {getattr(self, name)} must be 0 or a positive number"
                )
        for name in ("beta1", "beta2", "carry_over"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"--{flag(name)} {getattr(self, name)} must be at least 0 and below 1"
                )

    @property
    def rollouts_per_step(self) -> int:
        """B = P * G"""
        return self.prompts_per_step * self.group_size

    @property
    def minibatch_size(self) -> int:
        """responses of one optimizer step, over all processes"""
        return self.rollouts_per_step // self.minibatches

    @property
    def drops_zero_advantage(self) -> bool:
        """exact only while nothing but the advantage gives a response a gradient"""
        return self.drop_zero_advantage and not self.kl_coef

    @property
    def masks_mismatch(self) -> bool:
        """whether tokens are left out where trainer and sampler differ"""
        return self.algo in MASKS

    @property
    def folder(self) -> Path:
        """where the run writes"""
        return Path(self.out)

    def evaluates(self, step: int) -> bool:
        """whether an evaluation follows this step"""
        return step == self.steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        """whether a checkpoint follows this step"""
        return step == self.steps or (self.save_every > 0 and step % self.save_every == 0)

    def derived(self) -> str:
        """The numbers that follow from the config, each with its formula."""
        shown = (
            f"{self.rollouts_per_step} rollouts/step = {self.prompts_per_step} prompts x "
            f"{self.group_size} samples; {self.minibatches} optimizer steps of "
            f"{self.minibatch_size} responses each; loss / ({self.minibatch_size} x "
            f"{self.max_new_tokens})"
        )
        if self.lora_rank:
            shown += (
                f"; LoRA of rank {self.lora_rank} on {self.lora_targets}, scaled by "
                f"{self.lora_alpha}/{self.lora_rank}, lr {self.lr:g}"
            )
        return shown


def nearest_divisors(n: int, k: int) -> list[str]:
    """The divisors of n just below and just above k, which is none. Of numbers that are too large
    to search, 1 and n."""
    far = 100_000
    below = next((d for d in range(min(k, n), max(k - far, 0), -1) if n % d == 0), 1)
    above = next((d for d in range(k, min(k + far, n)) if n % d == 0), n)
    return [str(d) for d in sorted({below, above})]


# ---- recipes. Every value of the paper's has its source. "table 6" is the paper's own table (v2,
# App. G). "script" is examples/qwen2.5-math-7b.sh of the reference (sail-sg/understand-r1-zero),
# and "oat" a default of the library under it (sail-sg/oat, args.py).


def tiny() -> Config:
    """Minutes on two CPU cores: arithmetic, a 0.1 M parameter Qwen2 that a short supervised phase
    made half-competent."""
    return Config(
        recipe="tiny",
        model="tiny",
        dtype="float32",
        checkpointing="none",
        train_data="arithmetic",
        eval_data="arithmetic_heldout",
        template="arithmetic",
        engine="torch",  # vLLM takes a minute to start on a GPU, as long as this run
        prompts_per_step=32,
        group_size=8,
        max_new_tokens=96,
        minibatches=4,
        old_logprob="sampler",
        lr=3e-4,
        warmup_steps=5,
        tokens_per_microbatch=8192,
        steps=100,
        eval_every=20,
        eval_samples=3,
        save_every=100,
        kv_cache_gb=0.25,
    )


def oat_zero_7b() -> Config:
    """The paper's 7B run: MATH level 3-5 with the Qwen-Math template, 27 hours on 8 A100-80GB."""
    return Config(
        recipe="oat_zero_7b",
        model="Qwen/Qwen2.5-Math-7B",  # paper, Sec. 1
        train_data="math_lvl3to5",  # paper, Sec. 1: MATH level 3-5
        template="qwen_math",  # paper, Sec. 1
        eval_data="aime24,amc,math500,minerva,olympiad_bench",  # paper, Table 4
        eval_every=16,  # script; greedy, 3000 tokens
        prompts_per_step=128,  # script: rollout_batch_size
        group_size=8,  # table 6
        minibatches=8,  # script: train_batch_size 128 of 1024 responses
        max_prompt_tokens=1024,  # script: prompt_max_length
        max_new_tokens=3000,  # table 6; also the constant normalizer (Listing 1)
        sampler_batch=128,  # the 1024 responses of a step on 8 GPUs
        temperature=1.0,  # table 6
        algo="drgrpo",  # paper, Fig. 1
        clip_low=0.2,  # table 6
        clip_high=0.2,  # table 6
        old_logprob="recompute",  # oat: the learner computes them, the sampler's are not used
        tis_cap=0.0,  # oat has it since 0.2.1, after the paper
        kl_coef=0.0,  # table 6
        lr=1e-6,  # table 6
        warmup_steps=0,  # table 6: constant; the script's warm-up ratio has no effect on that
        beta1=0.9,  # table 6
        beta2=0.95,  # table 6
        weight_decay=0.0,  # table 6
        max_grad_norm=1.0,  # table 6
        dtype="bfloat16",  # oat: bfloat16, float32 master weights
        checkpointing="full",  # script: gradient_checkpointing
        steps=500,  # not published; 27 h / 500 is 194 s a step
        tokens_per_microbatch=16384,  # ours; the reference runs one response at a time
    )


def oat_zero_7b_fast() -> Config:
    """The paper's 7B run, faster. One setting changes what is learned, by rounding."""
    return replace(
        oat_zero_7b(),
        recipe="oat_zero_7b_fast",
        old_logprob="sampler",  # the ratio also holds what trainer and sampler differ by
        checkpointing="selective",  # exact
        compile=True,  # exact up to rounding
    )


def oat_zero_1_5b() -> Config:
    """The paper's 1.5B run, on MATH-12K; fits 40 GB cards."""
    return replace(
        oat_zero_7b(),
        recipe="oat_zero_1_5b",
        model="Qwen/Qwen2.5-Math-1.5B",  # paper, Table 4
        train_data="math_12k",  # examples/qwen2.5-math-1.5b.sh; Table 4 may mean level 3-5
    )


def oat_zero_3b() -> Config:
    """The paper's Llama run: Llama-3.2-3B continually pretrained on NuminaQA, R1 template."""
    return replace(
        oat_zero_7b(),
        recipe="oat_zero_3b",
        model="lkevinzc/Llama-3.2-3B-NuminaQA",  # paper, Sec. 3.4; llama3.2-3b-numinaqa.sh
        train_data="math_12k",  # same script
        template="r1",  # same script
    )


# ---- recipes for one card. Batches, minibatches and the normalizer count responses over all
# processes, so that the number of cards changes hours and memory only. The reference's batch flags
# are per device, and its 1.5B script did not learn on one card (understand-r1-zero, issue 31).


def gsm8k_0_5b() -> Config:
    """GSM8K with a 0.5B instruct model on one 24 GB card."""
    # python train.py --recipe gsm8k_0_5b --rehearse 1xRTX4090-24GB
    return replace(
        oat_zero_7b(),
        recipe="gsm8k_0_5b",
        model="Qwen/Qwen2.5-0.5B-Instruct",  # the smallest one that solves some of GSM8K
        train_data="gsm8k",  # 7 473 problems
        eval_data="gsm8k_test",  # 1 319 problems
        template="qwen_math",  # the chat format of the model, with the system prompt of the paper
        max_prompt_tokens=512,  # ours; no question has 1000 characters
        max_new_tokens=1024,  # ours; the budget of MATH is for longer solutions
        sampler_batch=256,  # ours; one card samples all 1024 responses
        steps=116,  # ours; two epochs
        save_every=16,  # ours; after each evaluation
    )


def math_1_5b() -> Config:
    """The paper's 1.5B run on one 80 GB card."""
    # python train.py --recipe math_1_5b --rehearse 1xA100-80GB
    # On 24 GB:
    # python train.py --recipe math_1_5b --lora-rank 32 --rehearse 1xRTX4090-24GB
    return replace(
        oat_zero_1_5b(),
        recipe="math_1_5b",
        eval_data="math500",  # ours; the five sets take one card longer than a step
        sampler_batch=256,  # ours; one card samples all 1024 responses
        save_every=16,  # ours; 16 steps take one card hours
    )


def math_7b_lora() -> Config:
    """The paper's 7B run with LoRA, on one 80 GB card."""
    # python train.py --recipe math_7b_lora --rehearse 1xA100-80GB
    return replace(
        oat_zero_7b(),
        recipe="math_7b_lora",
        lora_rank=32,  # ours; rank 1 can be enough for RL ("LoRA Without Regret")
        lora_alpha=32,  # "LoRA Without Regret"
        lora_targets="all-linear",  # same; attention alone is worse
        # lr is 10 times the 1e-6 of table 6, see LORA_LR_FACTOR
        eval_data="math500",  # ours, as in math_1_5b
        sampler_batch=256,  # ours, as in math_1_5b
        save_every=16,  # ours, as in math_1_5b
    )


def asdiv_smol() -> Config:
    """Half an hour on a CPU core: word problems with a pretrained model of 135 M parameters,
    after minutes of supervised training."""
    # every value is ours: what a core can do in the time
    return Config(
        recipe="asdiv_smol",
        model="smol",
        train_data="asdiv_formulas[25%:75%]",
        eval_data="asdiv_formulas[75%:]",
        template="{q}\n",
        answer="formula",  # such as 46-22, which the grader works out
        engine="torch",
        checkpointing="none",
        prompts_per_step=16,
        group_size=8,
        max_prompt_tokens=256,
        max_new_tokens=24,
        minibatches=2,
        old_logprob="sampler",
        lr=2e-5,
        warmup_steps=4,
        tokens_per_microbatch=2048,
        steps=32,
        eval_every=16,
        eval_samples=4,
        save_every=16,
        kv_cache_gb=1.0,
    )


_ALL = (
    tiny,
    asdiv_smol,
    gsm8k_0_5b,
    math_1_5b,
    math_7b_lora,
    oat_zero_1_5b,
    oat_zero_3b,
    oat_zero_7b,
    oat_zero_7b_fast,
)
RECIPES = {recipe.__name__: recipe for recipe in _ALL}


# ---- command line

REFUSED = {
    name: "training uses the log-probs of the whole distribution, so rollouts must come from it"
    for name in ("--top-p", "--top-k")
}


TOKENIZER_FILES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def check_model(name: str) -> None:
    """UserError for a path without a model. Whether the hub has a name shows when it is loaded."""
    check_path("--model", name)
    folder = Path(name)
    if name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not folder.exists():
        return
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {name} holds no config.json; name a Hugging Face folder, as OUT/hf, or a hub "
            "name"
        )
    read_object(folder / "config.json")
    # transformers makes an empty tokenizer where there is none
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise UserError(
            f"--model {name} holds no tokenizer; copy tokenizer.json and tokenizer_config.json of "
            "its base model into it"
        )


def parse_args(argv: list[str] | None = None) -> Config:
    """The recipe named by --recipe with the other flags on top. `--print-config` prints it and
    exits. `--rehearse` rehearses it and exits with 0 if it fits, else 2. UserError names what is
    wrong and the nearest valid thing."""
    recipes = "; ".join(f"{name}: {inspect.getdoc(recipe)}" for name, recipe in RECIPES.items())
    parser = Parser(
        Config,
        prog="train.py",
        description="Train a language model with Dr. GRPO.",
        epilog=f"recipes: {recipes}",
    )
    parser.refused = REFUSED
    parser.add_argument("--print-config", action="store_true", help="show the config and stop")
    parser.add_argument(
        "--rehearse",
        metavar="NxCARD",
        help="say whether the run fits a machine such as 8xA100-80GB, without a GPU, and stop",
    )
    given = parser.parse(argv)
    print_only, rehearsed = given.pop("print_config"), given.pop("rehearse")
    check_name("recipe", given["recipe"], RECIPES)
    config = replace(RECIPES[given["recipe"]](), **given)
    if config.lora_rank and "lr" not in given:
        config = replace(config, lr=float(f"{LORA_LR_FACTOR * config.lr:.6g}"))
    config = replace(config, out=config.out or f"runs/{config.recipe}")
    machine = parse_machine(rehearsed) if rehearsed else None
    world = machine.count if machine else world_size()
    check_divides(world, tp=config.tp or 1, dp_replicate=config.dp_replicate)
    if config.model not in ("tiny", "smol"):
        check_model(config.model)
    reward.check(config.reward)
    if print_only:
        print(json.dumps(asdict(config), indent=2), config.derived(), sep="\n")
        raise SystemExit(0)
    if machine:
        from drgrpo.run.rehearse import rehearse

        raise SystemExit(rehearse(config, machine))
    return config
