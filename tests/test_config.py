"""The command line: what is given is used, what is wrong is named with the nearest right thing."""

from dataclasses import fields

import pytest

from drgrpo.config import RECIPES, Config, field_docs, parse_args
from drgrpo.types import UserError


def test_a_recipe_with_overrides():
    config = parse_args(
        ["--recipe", "tiny", "--seed", "3", "--algo", "grpo", "--drop-zero-advantage", "false"]
    )
    assert (config.seed, config.algo, config.drop_zero_advantage, config.out) == (
        3,
        "grpo",
        False,
        "runs/tiny",
    )
    assert config.lr == RECIPES["tiny"]().lr


def test_the_papers_recipe():
    config = parse_args(["--recipe", "oat_zero_7b"])
    assert (
        config.rollouts_per_step == 1024
        and config.minibatches == 8
        and config.minibatch_size == 128
    )
    assert (config.lr, config.beta1, config.beta2, config.weight_decay, config.max_grad_norm) == (
        1e-6,
        0.9,
        0.95,
        0,
        1,
    )
    assert (config.max_prompt_tokens, config.max_new_tokens, config.temperature) == (
        1024,
        3000,
        1.0,
    )
    assert (config.clip_low, config.clip_high, config.old_logprob, config.tis_cap) == (
        0.2,
        0.2,
        "recompute",
        0,
    )
    assert config.eval_every == 16 and config.eval_samples == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "tinny"], "unknown recipe 'tinny'; did you mean 'tiny'"),
        (
            ["--recipe", "tiny", "--algo", "dr_grpo"],
            "unknown --algo 'dr_grpo'; did you mean 'drgrpo'",
        ),
        (["--recipe", "tiny", "--engine", "vlm"], "did you mean 'vllm'"),
        (["--recipe", "tiny", "--learning-rate", "1"], "unknown option '--learning-rate'"),
        (["--recipe", "tiny", "--minibatchs", "2"], "did you mean '--minibatches'"),
        (["--recipe", "tiny", "--minibatches", "3"], "try --minibatches 2 or 4"),
        (
            ["--recipe", "tiny", "--prompts-per-step", "0"],
            "--prompts-per-step 0 must be a positive number",
        ),
        (["--recipe", "tiny", "--lr", "nan"], "--lr nan must be a positive number"),
        (["--recipe", "tiny", "--lr", "fast"], "invalid float value: 'fast'"),
        (["--recipe", "tiny", "--group-size", "1"], "use 2 or more"),
        (["--recipe", "tiny", "--old-logprob", "none"], "--minibatches 1"),
        (["--recipe", "tiny", "--drop-zero-advantage", "maybe"], "neither true nor false"),
        (["--recipe", "tiny", "stray"], "unexpected argument 'stray'"),
        (["--recipe", "tiny", "--top-p", "0.9"], "truncated distribution"),
        (["--recipe", "tiny", "--top-k", "20"], "truncated distribution"),
        (
            ["--recipe", "tiny", "--algo", "grpo", "--kl-coef", "0.1"],
            "use drgrpo, grpo_std or rloo",
        ),
        (["--steps", "3"], "required: --recipe"),
    ],
    ids=lambda x: " ".join(x[1:] or x) if isinstance(x, list) else "",
)
def test_mistakes_are_named_with_the_way_out(argv, message):
    with pytest.raises(UserError) as error:
        parse_args(argv)
    assert message in str(error.value)


def test_a_switch_needs_no_value():
    assert parse_args(["--recipe", "tiny", "--compile", "--seed", "1"]).compile
    assert not parse_args(["--recipe", "tiny", "--compile", "false"]).compile


def test_a_kl_penalty_keeps_every_response():
    """With it a response without advantage has a gradient all the same."""
    assert parse_args(["--recipe", "tiny"]).drops
    assert not parse_args(["--recipe", "tiny", "--kl-coef", "0.01"]).drops


def test_every_field_is_documented_and_shown_by_help(capsys):
    assert set(field_docs(Config)) == {f.name for f in fields(Config)}
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for f in fields(Config):
        assert f"--{f.name.replace('_', '-')} " in shown
    assert all(recipe in shown for recipe in RECIPES)
    groups = (
        "model:",
        "data:",
        "rollout:",
        "algorithm:",
        "optimizer (AdamW):",
        "processes:",
        "run:",
        "debug:",
    )
    assert all(f"\n{group}\n" in shown for group in groups)


def test_derived_numbers_are_shown_with_their_formula():
    assert "256 rollouts/step = 32 prompts x 8 samples" in RECIPES["tiny"]().derived()
