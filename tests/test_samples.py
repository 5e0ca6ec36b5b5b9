"""Samples keep what a model wrote token by token, and little else."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from drgrpo.run import samples
from drgrpo.run.samples import SAMPLES_LOGGED, pieces, sample_rows
from drgrpo.types import Completion, Grade, Problem, Rollout

pytestmark = pytest.mark.usefixtures("group_of_one")

REWARD_PG = torch.tensor([[1.0, 0.0], [0.25, 1.0]])
ADVANTAGE_PG = torch.tensor([[0.5, -0.5], [-0.5, 0.5]])


def rollouts(tokenizer, prompts=2):
    made = []
    for i in range(2 * prompts):
        ids = tokenizer(f"text {i}").input_ids
        problem = Problem(i // 2, f"q{i // 2}", "1", tokenizer(f"Q: q{i // 2}").input_ids)
        completion = Completion([*ids, tokenizer.eos_token_id], [-0.12345] * (len(ids) + 1), i != 2)
        right = float(i in (0, 3))
        grade = Grade(right, True, right, {"math": right, "f": None})
        made.append(Rollout(problem, completion, f"text {i}", grade))
    return made


def test_samples_are_the_first_of_each_of_the_first_prompts(tokenizer):
    first, second = sample_rows(3, rollouts(tokenizer), REWARD_PG, ADVANTAGE_PG, tokenizer)
    assert first == {
        "step": 3,
        "problem": "q0",
        "answer": "1",
        "prompt": "Q: q0",
        "response": "text 0",
        "reward": 1.0,
        "components": {"math": 1.0, "f": None},
        "advantage": 0.5,
        "right": True,
        "tokens": 7,
        "finished": True,
        "pieces": ["t", "e", "x", "t", " ", "0", ""],
        "logprobs": [-0.123] * 7,
    }
    shown = [second[name] for name in ("response", "reward", "advantage", "right", "finished")]
    assert shown == ["text 2", 0.25, -0.5, False, False], "no component is right"
    many = rollouts(tokenizer, prompts=40)
    zeros = torch.zeros(40, 2)
    assert len(sample_rows(3, many, zeros, zeros, tokenizer)) == SAMPLES_LOGGED


def test_the_step_comes_first_so_that_a_line_can_be_skipped(tokenizer):
    row = sample_rows(3, rollouts(tokenizer), REWARD_PG, ADVANTAGE_PG, tokenizer)[0]
    assert json.dumps(row).startswith('{"step": 3, ')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a😀b", ["a", "", "", "", "😀", "b"]),
        ("é\n", ["", "é", "\n"]),
        ("👩‍🚀", ["", "", "", "👩", "", "", "\u200d", "", "", "", "🚀"]),
        ("", []),
    ],
)
def test_the_last_token_of_a_character_adds_it(tokenizer, text, expected):
    assert pieces(tokenizer(text).input_ids, tokenizer) == expected


def test_joined_pieces_are_the_text_also_where_bytes_are_no_characters(tokenizer):
    emoji, eos = tokenizer("😀").input_ids, tokenizer.eos_token_id
    for ids in (emoji[:2], [*emoji[:3], *emoji, eos], [eos, *emoji, eos, *emoji[1:]]):
        found = pieces(ids, tokenizer)
        assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(found) == len(ids)


def test_a_space_that_a_tokenizer_strips_at_the_start_of_a_text_is_kept_inside_it():
    """As SentencePiece's tokenizers do."""
    vocab = {"▁two": 0, "▁words": 1, "s": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert pieces([0, 1, 2, 0], fast) == ["two", " words", "s", " two"]


def test_a_sure_token_has_a_log_prob_without_a_sign(tokenizer):
    made = rollouts(tokenizer)
    made[0] = replace(made[0], completion=replace(made[0].completion, logprobs=[-1e-9]))
    row = sample_rows(3, made, REWARD_PG, ADVANTAGE_PG, tokenizer)[0]
    assert str(row["logprobs"]) == "[0.0]"


def test_only_rank_0_makes_rows(tokenizer, monkeypatch):
    monkeypatch.setattr(samples.dist, "get_rank", lambda: 1)
    assert sample_rows(3, rollouts(tokenizer), REWARD_PG, ADVANTAGE_PG, tokenizer) == []
