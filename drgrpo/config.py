"""Every knob of the trainer, the recipes, and the command line made from them.

A field is one line here and one flag of `train.py`; its docstring is its `--help`. A recipe is a
function that returns a `Config`; `--field value` overrides it. The object that is printed, saved
and compared on resume is the object that is used.
"""

import argparse
import ast
import difflib
import inspect
import math
import re
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from typing import get_type_hints

from drgrpo.advantage import DIVIDE_BY_LENGTH
from drgrpo.types import UserError

CHOICES = {
    "algo": ("drgrpo", "grpo", "grpo_length", "grpo_std", "rloo", "dapo"),
    "engine": ("auto", "torch", "vllm"),
    "old_logprob": ("sampler", "recompute", "none"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "flash_attn", "varlen", "sdpa"),
    "kernel": ("auto", "triton", "torch"),
    "checkpointing": ("none", "selective", "full"),
    "sleep": ("auto", "on", "off"),
    "resume": ("auto", "never"),
}

MAY_CHANGE_ON_RESUME = {
    "out",
    "steps",
    "eval_every",
    "save_every",
    "keep",
    "samples_logged",
    "budget_hours",
    "max_hours",
    "cache_dir",
    "resume",
    "dump_rollouts",
    "tensorboard",
    "wandb",
    "watchdog_minutes",
    "dry_run",
    "print_config",
    "attention",
    "kernel",
    "checkpointing",
    "compile",
    "dp_replicate",
    "tokens_per_microbatch",
    "sleep",
    "kv_cache_gb",
    "sampler_batch",
    "drop_zero_advantage",
}
"""Fields that a resumed run may set anew: they change when and how things are computed, not what is
learned, up to rounding."""


@dataclass(frozen=True, kw_only=True)
class Config:
    recipe: str
    """name of the recipe that the other values start from"""
    out: str = ""
    """folder of the run (default: runs/RECIPE)"""
    seed: int = 0
    """seeds the warm-up, the order of the data and, with step, problem and sample, every rollout"""

    # model
    model: str = ""
    """Hugging Face folder or hub name of the policy to start from; `tiny` builds and warms up a 0.1
    M parameter one"""
    dtype: str = "bfloat16"
    """compute type of the policy and of the sampler; master weights and optimizer state are
    float32"""
    attention: str = "auto"
    """attention over packed sequences: flash_attn (package), varlen (PyTorch's FlashAttention-2),
    sdpa (padded, exact)"""
    kernel: str = "auto"
    """backend of the fused LM head and loss: triton on CUDA, torch elsewhere, unless named"""
    checkpointing: str = "full"
    """activations: none recomputed, all but matmul outputs (selective), or whole blocks (full) in
    the backward pass"""
    compile: bool = False
    """torch.compile every block"""

    # data
    train_data: str = ""
    """.jsonl, .json or .parquet file, `save_to_disk` folder, hub name `name[:split]`, or a named
    set"""
    eval_data: str = ""
    """comma-separated sources of the in-loop evaluation, each as for train_data; empty: none"""
    problem_field: str = "problem"
    """column of the question"""
    answer_field: str = "answer"
    """column of the ground truth"""
    template: str = "qwen_math"
    """how a question becomes a prompt and where the answer is looked for: see
    drgrpo/templates.py"""
    max_prompt_tokens: int = 1024
    """longer prompts are dropped, and counted"""

    # rollout
    engine: str = "auto"
    """sampler: vllm, or torch (KV-cache sampler in plain PyTorch); auto is vllm on CUDA, torch
    elsewhere"""
    prompts_per_step: int = 128
    """P, prompts per rollout phase, over all processes"""
    group_size: int = 8
    """G, samples per prompt"""
    max_new_tokens: int = 3000
    """generation budget of a response, and the constant C that Dr. GRPO divides by"""
    temperature: float = 1.0
    """sampling temperature of the rollouts; the trainer's log-probs use the same"""
    top_p: float = 1.0
    """only 1: anything less would sample from another distribution than the one that is trained"""
    top_k: int = -1
    """only -1, for the same reason"""
    sampler_batch: int = 256
    """sequences that a sampler runs at once, per process"""
    kv_cache_gb: float = 0.0
    """GB of vLLM's key-value cache per process; 0: what the memory ledger leaves, or 0.25 without a
    GPU"""
    tp: int = 1
    """processes that share one vLLM engine, for models that one GPU cannot sample"""
    sleep: str = "auto"
    """vLLM gives its memory back while training (on), stays resident (off), or the memory ledger
    decides"""

    # algorithm
    algo: str = "drgrpo"
    """drgrpo, or for comparison grpo, its length or its std term alone, rloo, dapo: the same
    kernel, rescaled advantages"""
    minibatches: int = 8
    """optimizer steps per rollout phase"""
    clip_low: float = 0.2
    """the ratio is clipped to [1 - clip_low, 1 + clip_high]"""
    clip_high: float = 0.2
    """see clip_low"""
    old_logprob: str = "recompute"
    """denominator of the ratio: the sampler's log-probs, a no-grad pass of the trainer (the paper),
    or none (ratio = 1)"""
    tis_cap: float = 0.0
    """truncated importance sampling: weight min(old / sampler, tis_cap) on every token; 0: off"""
    kl_coef: float = 0.0
    """weight of a KL penalty (k3) to the starting model, which is then kept; the paper has none.
    Not with grpo or dapo"""
    drop_zero_advantage: bool = True
    """leave responses out of the training pass whose advantage is zero: exact, they have no
    gradient"""

    # optimizer (AdamW)
    lr: float = 1e-6
    """learning rate, constant after warmup_steps"""
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
    """packed tokens of one forward and backward pass, per process; a longer sequence goes alone"""

    # processes
    dp_replicate: int = 1
    """HSDP: copies of the sharded model, such as the number of nodes; 1 shards over all
    processes"""
    watchdog_minutes: float = 60.0
    """a phase that takes longer ends the run, after every process has said where it hangs. 0:
    never"""

    # run
    steps: int = 500
    """rollout phases"""
    eval_every: int = 16
    """steps between evaluations; also before the first step and after the last. 0: only those
    two"""
    eval_samples: int = 0
    """evaluate also with this many samples per problem at the training temperature, next to the
    greedy answer"""
    save_every: int = 50
    """steps between checkpoints; also after the last step. 0: only then"""
    keep: int = 2
    """newest checkpoints that are kept"""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in --out, if there is one; never: refuse a
    folder that has one"""
    max_hours: float = 0.0
    """save and stop after this many hours of this process's life, as on SIGTERM and SIGUSR1. 0: no
    limit"""
    samples_logged: int = 4
    """responses per step written to samples.jsonl"""
    parity_mean: float = 0.0
    """stop when trainer and sampler disagree by more than this many nats on average (0: by dtype,
    see drgrpo/parity.py)"""
    parity_max: float = 0.0
    """stop when they disagree by more than this on one token (0: by dtype)"""
    budget_hours: float = 27.0
    """the step line shows the hours used of this budget"""
    cache_dir: str = "runs/warmup"
    """where warmed-up tiny models are kept, by their inputs"""
    tensorboard: bool = False
    """write the metrics to OUT/tensorboard too"""
    wandb: str = ""
    """Weights & Biases project to write the metrics to"""

    # debug
    print_config: bool = False
    """show the resolved config and stop"""
    dry_run: bool = False
    """run the longest possible micro-batch and one step, show memory and projected hours, and stop
    without a trace"""
    dump_rollouts: bool = False
    """write every step's rollouts to OUT/rollouts/"""
    replay: str = ""
    """folder of dumped rollouts to train on instead of sampling"""

    def __post_init__(self):
        for name, choices in CHOICES.items():
            check_name(f"--{flag(name)}", getattr(self, name), choices)
        for name in (
            "prompts_per_step",
            "group_size",
            "max_new_tokens",
            "minibatches",
            "sampler_batch",
            "steps",
            "max_prompt_tokens",
            "tokens_per_microbatch",
            "keep",
            "temperature",
            "lr",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be a positive number")
        if self.top_p != 1 or self.top_k != -1:
            raise UserError(
                f"--top-p {self.top_p} --top-k {self.top_k} would sample from a truncated distribution, while ratios and "
                "gradients are those of the whole one: leave them at 1 and -1"
            )
        if self.group_size < 2:
            raise UserError(
                "--group-size 1 leaves no group to compare with: every advantage would be 0; use 2 or more"
            )
        if self.rollouts_per_step % self.minibatches:
            nearest = nearest_divisors(self.rollouts_per_step, self.minibatches)
            raise UserError(
                f"{self.rollouts_per_step} rollouts per step (--prompts-per-step {self.prompts_per_step} x --group-size "
                f"{self.group_size}) do not divide into --minibatches {self.minibatches}; "
                f"try --minibatches {' or '.join(map(str, nearest))}"
            )
        if self.old_logprob == "none" and self.minibatches > 1:
            raise UserError(
                f"--old-logprob none is exact only with one update per rollout, not with --minibatches {self.minibatches}; "
                "use --minibatches 1, or --old-logprob sampler or recompute"
            )
        if self.kl_coef and self.algo in (*DIVIDE_BY_LENGTH, "dapo"):
            raise UserError(
                f"--kl-coef {self.kl_coef} with --algo {self.algo}: the penalty would be divided by B x max_new_tokens and not "
                "as this objective divides its tokens, so its weight would be another than yours; use drgrpo, grpo_std or rloo"
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
    def drops(self) -> bool:
        """zero-advantage responses are dropped: exact only while nothing but the advantage gives
        them a gradient"""
        return self.drop_zero_advantage and not self.kl_coef

    def derived(self) -> str:
        """The numbers that follow from the config, each with its formula."""
        return (
            f"{self.rollouts_per_step} rollouts/step = {self.prompts_per_step} prompts x {self.group_size} samples; "
            f"{self.minibatches} optimizer steps of {self.minibatch_size} responses each; "
            f"loss / ({self.minibatch_size} x {self.max_new_tokens})"
        )


# ---- recipes: `tiny` for a laptop, and the paper's, each value with its source. "script" is
# examples/qwen2.5-math-7b.sh of the reference (sail-sg/understand-r1-zero), "oat" a default of the
# library under it (sail-sg/oat, args.py)


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
        prompts_per_step=32,
        group_size=8,
        max_new_tokens=96,
        minibatches=4,
        old_logprob="sampler",
        lr=3e-4,
        warmup_steps=5,
        tokens_per_microbatch=8192,
        steps=200,
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
        group_size=8,  # script: num_samples
        minibatches=8,  # script: train_batch_size 128 of 1024 responses
        max_prompt_tokens=1024,  # script: prompt_max_length
        max_new_tokens=3000,  # script: generate_max_length, which is also the constant normalizer (paper, Listing 1)
        temperature=1.0,
        top_p=1.0,
        top_k=-1,  # script
        algo="drgrpo",  # paper, Fig. 1
        clip_low=0.2,
        clip_high=0.2,  # oat: cliprange
        old_logprob="recompute",  # oat: the learner recomputes them; the sampler's are not used for the ratio
        tis_cap=0.0,  # oat has it since 0.2.1, after the paper
        kl_coef=0.0,  # paper, Sec. 3: beta = 0 throughout
        lr=1e-6,
        warmup_steps=0,  # script: constant; its warm-up ratio has no effect on that schedule
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.0,  # oat
        max_grad_norm=1.0,  # oat
        dtype="bfloat16",  # oat: bfloat16, float32 master weights
        checkpointing="full",  # script: gradient_checkpointing
        steps=500,  # not published; the guess of a reader of the paper. 27 h / 500 is 194 s a step
        budget_hours=27.0,  # paper, Sec. 1
        tokens_per_microbatch=16384,  # ours: the reference runs one response at a time, which gives the same gradient
    )


def oat_zero_1_5b() -> Config:
    """The paper's 1.5B run, on MATH-12K; fits 40 GB cards."""
    return replace(
        oat_zero_7b(),
        recipe="oat_zero_1_5b",
        model="Qwen/Qwen2.5-Math-1.5B",  # paper, Table 4
        train_data="math_12k",  # examples/qwen2.5-math-1.5b.sh; the caption of Table 4 can also be read as level 3-5
    )


def oat_zero_3b() -> Config:
    """The paper's Llama run: Llama-3.2-3B continually pretrained on NuminaQA, R1 template."""
    return replace(
        oat_zero_7b(),
        recipe="oat_zero_3b",
        model="lkevinzc/Llama-3.2-3B-NuminaQA",  # paper, Sec. 3.4; examples/llama3.2-3b-numinaqa.sh
        train_data="math_12k",  # same script
        template="r1",  # same script
    )


RECIPES = {recipe.__name__: recipe for recipe in (tiny, oat_zero_1_5b, oat_zero_3b, oat_zero_7b)}


# ---- command line


def check_name(what: str, value: str, valid) -> None:
    """UserError unless `value` is one of `valid`; the message offers the nearest."""
    valid = list(valid)
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown {what} {value!r}; {hint}there are {', '.join(valid)}")


def nearest_divisors(n: int, k: int) -> list[int]:
    """The divisors of n just below and just above k."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below, above = [d for d in divisors if d < k][-1:], [d for d in divisors if d > k][:1]
    return below + above


def flag(name: str) -> str:
    return name.replace("_", "-")


def field_docs(cls) -> dict[str, str]:
    """Field name -> the string literal under it: a dataclass field has no docstring at run time."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: doc.value.value
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    }


def field_groups(cls) -> dict[str, str]:
    """Field name -> the comment line above its group."""
    groups, title = {}, "run"
    for line in inspect.getsource(cls).splitlines():
        if line.startswith("    # "):
            title = line[6:]
        elif match := re.match(r"    (\w+): \w+", line):
            groups[match[1]] = title
    return groups


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class Parser(argparse.ArgumentParser):
    """One flag per field of a dataclass, its docstring as help. Errors are `UserError`s, with the
    nearest flag for an unknown one."""

    def __init__(self, cls, **kwargs):
        super().__init__(allow_abbrev=False, usage="%(prog)s [--field value ...]", **kwargs)
        docs, types = field_docs(cls), get_type_hints(cls)
        groups: dict[str, argparse._ArgumentGroup] = {}
        for f in fields(cls):
            title = field_groups(cls).get(f.name, "what")
            group = groups[title] = groups.get(title) or self.add_argument_group(title)
            kind = parse_bool if types[f.name] is bool else types[f.name]
            required = f.default is MISSING
            shown = docs[f.name].replace("%", "%%") + (
                "" if required or f.default == "" else f" ({f.default})"
            )
            metavar = (
                "{" + ",".join(CHOICES[f.name]) + "}"
                if f.name in CHOICES
                else types[f.name].__name__.upper()
            )
            switch = (
                {"nargs": "?", "const": True} if kind is parse_bool else {}
            )  # --compile is --compile true
            group.add_argument(
                f"--{flag(f.name)}",
                type=kind,
                help=shown,
                metavar=metavar,
                required=required,
                default=argparse.SUPPRESS,
                **switch,
            )

    def error(self, message):
        raise UserError(message)

    def parse(self, argv: list[str] | None = None) -> dict:
        """The fields that were given on the command line."""
        given, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                raise UserError(f"unexpected argument {name!r}; options are written --name value")
            check_name(
                "option",
                name,
                [o for a in self._actions for o in a.option_strings if o.startswith("--")],
            )
        return vars(given)


def parse_args(argv: list[str] | None = None) -> Config:
    """The recipe named by --recipe with the other flags on top. UserError names what is wrong and
    the nearest right thing."""
    recipes = "; ".join(f"{name}: {inspect.getdoc(recipe)}" for name, recipe in RECIPES.items())
    given = Parser(
        Config,
        prog="train.py",
        description="Train a language model with Dr. GRPO.",
        epilog=f"recipes: {recipes}",
    ).parse(argv)
    check_name("recipe", given["recipe"], RECIPES)
    config = replace(RECIPES[given["recipe"]](), **given)
    return replace(config, out=config.out or f"runs/{config.recipe}")
