"""The config: recipes, their sources' values, and mistakes in them. (Parsing: test_cli.py.)"""

import subprocess
import sys
from dataclasses import fields

import pytest

from conftest import ROOT
from drgrpo import data
from drgrpo.advantage import DIVIDE_BY_LENGTH, DIVIDE_BY_TOKENS
from drgrpo.config import (
    MASKS,
    MAY_CHANGE_ON_RESUME,
    RECIPES,
    TOKENS_WEIGHED,
    Config,
    nearest_divisors,
    parse_args,
)
from drgrpo.run import folder
from drgrpo.run.cli import field_docs
from drgrpo.types import UserError


def test_a_recipe_with_overrides():
    config = parse_args(
        ["--recipe", "tiny", "--seed", "3", "--algo", "grpo", "--drop-zero-advantage", "false"]
    )
    assert (config.seed, config.algo, config.drop_zero_advantage) == (3, "grpo", False)
    assert config.out == "runs/tiny" and config.lr == RECIPES["tiny"]().lr


def test_the_papers_recipe():
    config = parse_args(["--recipe", "oat_zero_7b"])
    expected = {
        "rollouts_per_step": 1024,
        "minibatches": 8,
        "minibatch_size": 128,
        "lr": 1e-6,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0,
        "max_grad_norm": 1,
        "max_prompt_tokens": 1024,
        "max_new_tokens": 3000,
        "temperature": 1,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "old_logprob": "recompute",
        "tis_cap": 0,
        "kl_coef": 0,
        "eval_every": 16,
        "eval_samples": 0,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("name", ["math_1_5b", "math_7b_lora", "gsm8k_0_5b"])
def test_the_recipes_for_one_card_keep_the_papers_batch(name):
    """What the number of cards must not change: responses of a step and of an update, and what the
    loss is divided by."""
    paper, ours = RECIPES["oat_zero_7b"](), RECIPES[name]()
    same = ["prompts_per_step", "group_size", "minibatches", "algo", "lr", "clip_low", "clip_high"]
    same += ["old_logprob", "temperature", "max_grad_norm", "beta2"]
    if name != "gsm8k_0_5b":  # another task
        same += ["max_new_tokens", "template"]
    assert {f: getattr(ours, f) for f in same} == {f: getattr(paper, f) for f in same}


def test_the_lora_recipe_trains_with_ten_times_the_papers_learning_rate():
    config = parse_args(["--recipe", "math_7b_lora"])
    assert (config.lora_rank, config.lr) == (32, 1e-5)
    assert parse_args(["--recipe", "math_7b_lora", "--lora-rank", "0"]).lr == 1e-6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--recipe tinny", "unknown recipe 'tinny'; did you mean 'tiny'"),
        ("--recipe tiny --algo dr_grpo", "unknown --algo 'dr_grpo'; did you mean 'drgrpo'"),
        ("--recipe tiny --engine vlm", "did you mean 'vllm'"),
        ("--recipe tiny --template qwen-math", "did you mean 'qwen_math'"),
        ("--recipe tiny --answer box", "unknown --answer 'box'; did you mean 'boxed'"),
        ("--recipe tiny --system hi", "--system goes with --template chat"),
        ("--recipe tiny --reward maths", "'maths' is neither math nor FILE.py:FUNCTION"),
        ("--recipe tiny --reward no.py:f", "there is no file no.py"),
        ("--recipe tiny --learning-rate 1", "unknown option '--learning-rate'"),
        ("--recipe tiny --minibatchs 2", "did you mean '--minibatches'"),
        ("--recipe tiny --minibatches 3", "try --minibatches 2 or 4"),
        ("--recipe tiny --lr nan", "--lr nan must be a positive number"),
        ("--recipe tiny --temperature inf", "--temperature inf must be a positive number"),
        ("--recipe tiny --group-size 1", "use 2 or more"),
        ("--recipe tiny --old-logprob none --minibatches 2", "--minibatches 1"),
        ("--recipe tiny --logits shifted", "--dtype is float32; use --logits auto"),
        ("--recipe tiny --speculate ngram --batch-invariant true", "leave one of the two out"),
        ("--recipe tiny --top-p 0.9", "log-probs of the whole distribution"),
        ("--recipe tiny --top-k=20", "log-probs of the whole distribution"),
        ("--recipe tiny --carry-over 1", "--carry-over 1.0 must be at least 0 and below 1"),
        ("--recipe gsm8k_0_5b --carry-over 0.25", "add --old-logprob sampler, or leave --carry-"),
        ("--recipe tiny --algo grpo --kl-coef 0.1", "use drgrpo, grpo_std or rloo"),
        ("--steps 3", "required: --recipe"),
    ],
)
def test_mistakes_are_named_with_the_way_out(argv, message):
    with pytest.raises(UserError) as error:
        parse_args(argv.split())
    assert message in str(error.value)


POSITIVE = (
    *("prompts-per-step", "group-size", "max-new-tokens", "max-prompt-tokens", "steps", "keep"),
    *("minibatches", "tokens-per-microbatch", "sampler-batch", "dp-replicate"),
    *("temperature", "lr", "carry-steps"),
)


@pytest.mark.parametrize("name", POSITIVE)
def test_what_must_be_positive_is_refused_at_zero(name):
    with pytest.raises(UserError, match=rf"--{name} 0(\.0)? must be a positive number"):
        parse_args(["--recipe", "tiny", f"--{name}", "0"])


def test_a_kl_penalty_keeps_every_response():
    """With a penalty, a response without advantage has a gradient all the same."""
    assert parse_args(["--recipe", "tiny"]).drops_zero_advantage
    assert not parse_args(["--recipe", "tiny", "--kl-coef", "0.01"]).drops_zero_advantage


def test_the_kl_refusal_names_every_objective_that_weighs_tokens():
    assert {*DIVIDE_BY_LENGTH, *DIVIDE_BY_TOKENS} == set(TOKENS_WEIGHED)


@pytest.mark.parametrize("algo", MASKS)
def test_a_mask_needs_the_trainer_s_log_probs_and_a_bound(algo):
    command = ["--recipe", "tiny", "--algo", algo, "--tis-cap", "5", "--old-logprob"]
    assert parse_args([*command, "recompute"]).masks_mismatch
    with pytest.raises(UserError, match=rf"--algo {algo} .* --old-logprob sampler leaves .*; use"):
        parse_args([*command, "sampler"])
    with pytest.raises(UserError, match=r"--tis-cap is 1; use a value above 1, such as 5"):
        parse_args([*command, "recompute", "--tis-cap", "1"])


def test_cispo_has_a_weight_of_its_own():
    assert not parse_args(["--recipe", "tiny", "--algo", "cispo"]).masks_mismatch
    with pytest.raises(UserError, match=r"--tis-cap 2 with --algo cispo, .*; leave --tis-cap out"):
        parse_args(["--recipe", "tiny", "--algo", "cispo", "--tis-cap", "2"])


def test_evaluations_and_checkpoints_fall_on_multiples_and_on_the_last_step():
    config = parse_args(
        ["--recipe", "tiny", "--steps", "7", "--eval-every", "3", "--save-every", "0"]
    )
    assert [step for step in range(1, 8) if config.evaluates(step)] == [3, 6, 7]
    assert [step for step in range(1, 8) if config.saves(step)] == [7]


def test_there_are_at_most_66_fields_each_documented_and_shown_by_help(capsys):
    names = {f.name for f in fields(Config)}
    assert len(names) <= 66, "a setting has to earn its place: replace one or use a constant"
    assert set(field_docs(Config)) == names and set(MAY_CHANGE_ON_RESUME) <= names
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in names:
        assert f"--{name.replace('_', '-')} " in shown
    assert all(recipe in shown for recipe in RECIPES)
    for group in ("model", "data", "rollout", "algorithm", "optimizer (AdamW)", "processes", "run"):
        assert f"\n{group}:\n" in shown


def test_the_resolved_config_can_be_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--recipe", "oat_zero_7b", "--print-config", "--seed", "7"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert '"seed": 7' in shown and '"lr": 1e-06' in shown and "1024 rollouts/step" in shown


def test_derived_numbers_are_shown_with_their_formula():
    assert "256 rollouts/step = 32 prompts x 8 samples" in RECIPES["tiny"]().derived()


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    """transformers would go on with an empty one."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"--model {tmp_path} holds no tokenizer; copy"):
        parse_args(["--recipe", "tiny", "--model", str(tmp_path)])
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "spiece.model"):
        (tmp_path / name).touch()
        assert parse_args(["--recipe", "tiny", "--model", str(tmp_path)]).model == str(tmp_path)
        (tmp_path / name).unlink()


PLAIN = (
    "config",
    "data",
    "templates",
    "types",
    "grade",
    "reward",
    "workers",
    "run.folder",
    "run.hub",
)


@pytest.mark.parametrize("name", PLAIN)
def test_what_answers_a_mistake_imports_no_torch(name):
    code = f"import sys, drgrpo.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("option", ["out", "model", "train-data", "eval-data"])
def test_a_name_that_no_file_can_have_is_refused(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no run in runs/tiny
    for name, message in (("a" * 5000, "is too long"), ("a\0b", "is no name of a file")):
        with pytest.raises(UserError, match=message):
            config = parse_args(["--recipe", "tiny", f"--{option}", name])
            folder.check(config)
            data.check_sources(config)


@pytest.mark.parametrize("option", ["out", "template", "wandb"])
def test_a_text_that_is_not_utf_8_is_refused(option):
    with pytest.raises(UserError, match=rf"--{option} .*udc80' is not UTF-8"):
        parse_args(["--recipe", "tiny", f"--{option}", "{q}\udc80"])


def test_the_nearest_divisors_of_a_huge_number_take_no_time():
    assert nearest_divisors(256, 7) == ["4", "8"] and nearest_divisors(256, 300) == ["256"]
    assert nearest_divisors(256, 3) == ["2", "4"] and nearest_divisors(7, 3) == ["1", "7"]
    assert nearest_divisors(10**18, 7) == ["5", "8"]
    assert nearest_divisors(10**18 + 9, 10**9) == ["1", str(10**18 + 9)]


def test_a_model_whose_config_is_broken_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json is not readable as JSON"):
        parse_args(["--recipe", "tiny", "--model", str(tmp_path)])
