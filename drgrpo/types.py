"""What flows through the trainer, one type per arrow.

    Problem -> rollout -> Rollout -> grade -> reward_PG -> advantage_PG -> pack -> Batch -> update
    -> weights -> sync

Shape suffixes, the same in every file:

    P  prompts of a step                 D  model width
    G  samples per prompt (the group)    V  vocabulary
    B  rollouts, B = P * G               T  packed tokens of a micro-batch
    L  length of one padded row          N  response tokens of a micro-batch, N < T
    S  sequences of a micro-batch        H, K  attention heads, key-value heads
"""

from __future__ import annotations

import difflib
import errno
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a mistake on the command line is answered before torch is imported
    from torch import Tensor

MAX_BATCHED_TOKENS = 8192
"""Tokens of one forward pass of vLLM on a GPU. The memory ledger counts its activations."""

Answer = str | float | int | list[str]
"""A ground truth. A list means that any one of its members is right (Minerva, OlympiadBench)."""


class UserError(ValueError):
    """A mistake in what the user asked for. The message names the value and the way out; `train.py`
    and `eval.py` print it without a traceback and exit with status 2."""


class ParityError(RuntimeError):
    """The sampler does not hold the trainer's weights, or computes something else with them."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The most similar name, as a question to put into a message; empty if none is similar."""
    similar = difflib.get_close_matches(name, map(str, names), n=1, cutoff=0.4)
    return f"did you mean {similar[0]!r}? " if similar else ""


def check_name(what: str, name: str, names: Iterable[str]) -> None:
    """UserError unless `name` is one of `names`. The message offers the nearest."""
    names = list(names)
    if name not in names:
        hint = nearest(name, names)
        raise UserError(f"unknown {what} {name!r}; {hint}there are {', '.join(names)}")


def check_path(what: str, path: str | Path) -> None:
    """UserError if no file can have this name. There need not be one."""
    try:
        os.lstat(path)
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise UserError(f"{what} {str(path)!r} is no name of a file: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = str(path)
            raise UserError(
                f"{what} {name[:60]}... is too long for the name of a file, with {len(name)} "
                "characters; choose a shorter one"
            ) from error


def is_utf8(text: str) -> bool:
    """False for half of a surrogate pair, which JSON and a command line can hold and no file or
    tokenizer takes."""
    return text == text.encode(errors="ignore").decode()


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text. ValueError if it is broken or nests too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def world_size() -> int:
    """Processes that torchrun has started, 1 without it. Known before torch is imported."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_divides(world: int, **counts: int) -> None:
    """UserError unless each option's count divides the number of processes."""
    for name, count in counts.items():
        if world % count:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {count} does not divide the {world} processes")


def comma_list(text: str) -> list[str]:
    """The distinct words between commas, in order."""
    words = [word.strip() for word in text.split(",")]
    return list(dict.fromkeys(word for word in words if word))


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its ground truth. `id` is its row in the data set and part of every
    sampling seed; `prompt_ids` is the question in its template, tokenized, once that has been
    done. `columns` are the row's other columns, for reward functions."""

    id: int
    question: str
    answer: Answer
    prompt_ids: list[int] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy. `stop_token_ids` and `stop` strings end a response
    and are part of it. No top-p and no top-k: training on them would need their renormalised
    log-probs to be those of the policy."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one `Request`.

    token_ids: the sampled tokens, the stop token (EOS) included. logprobs:  log-probability of each
    under the distribution that it was drawn from (after temperature). finished:  True if a stop
    rule ended it, False if it ran into the length limit. open: True if neither did, and it can go
    on from here.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    open: bool = False


BLANK = Completion([], [], finished=False, open=True)
"""A response of which nothing is drawn yet."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw: a tokenized prompt and the seed of its random numbers, which so do not
    depend on what else is in the batch or on the number of processes. `drawn`: an open response to
    the prompt. The sample goes on from there."""

    prompt_ids: list[int]
    seed: int
    drawn: Completion = BLANK


OnFinish = Callable[[int, Completion], None]
"""Called with the index of a request and its completion."""


def no_callback(index: int, completion: Completion) -> None:
    """Do nothing."""


def never() -> bool:
    """Do not leave any response open."""
    return False


@dataclass(frozen=True, slots=True)
class Grade:
    """score: 1.0 for a right answer, else 0.0. parsed: whether the response holds an answer in the
    form that its template asks for.

    reward: the sum of `components`, each with its weight in `--reward`. A component is None if its
    function failed, and then counts as 0."""

    score: float
    parsed: bool
    reward: float = 0.0
    components: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled response to a problem, with its text as the grader sees it (special tokens left
    out). Its grade comes later.

    seed: of its random numbers. step: in which it was begun. stale: how many of its first tokens
    were drawn in earlier steps, from older weights."""

    problem: Problem
    completion: Completion
    text: str
    grade: Grade = Grade(0.0, parsed=False)
    seed: int = 0
    step: int = 0
    stale: int = 0

    @property
    def length(self) -> int:
        """response tokens, the stop token included"""
        return len(self.completion.token_ids)


@dataclass(slots=True)
class Batch:
    """A packed micro-batch: S sequences end to end, no padding. Only response tokens reach the LM
    head.

    token_T, position_T: ids and positions. Positions restart at 0 with every sequence.
    cu_seqlens: int32 [S + 1], where the sequences start. `max_seqlen` is the longest of them.
    row_N: index into T of the hidden state that predicts each response token.
    target_N: the response tokens.
    advantage_N, sampler_logprob_N: fp32, per response token.
    fresh_N: bool, whether a response token was drawn in this step, from the newest weights.
    old_logprob_N: fp32, what the ratio divides by. None means ratio 1.
    ref_logprob_N: fp32, of the reference model of a KL penalty. None means no penalty.
    """

    token_T: Tensor
    position_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    row_N: Tensor
    target_N: Tensor
    advantage_N: Tensor
    sampler_logprob_N: Tensor
    fresh_N: Tensor
    old_logprob_N: Tensor | None = None
    ref_logprob_N: Tensor | None = None
