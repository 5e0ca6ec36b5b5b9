"""What `samples.jsonl` holds of a step. docs/metrics.md explains each column."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drgrpo.run.metrics import is_right
from drgrpo.types import Rollout

SAMPLES_LOGGED = 32  # prompts of a step whose first response goes into samples.jsonl


def sample_rows(
    step: int,
    rollouts: list[Rollout],
    reward_PG: Tensor,
    advantage_PG: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The first response to each of the first prompts. Rank 0 writes them, and only it pays."""
    if dist.get_rank():
        return []
    rewards, advantages = reward_PG.flatten().tolist(), advantage_PG.flatten().tolist()
    responses = list(zip(rollouts, rewards, advantages, strict=True))
    first = responses[:: reward_PG.shape[1]]
    return [sample_row(step, *response, tokenizer) for response in first[:SAMPLES_LOGGED]]


def sample_row(
    step: int, rollout: Rollout, reward: float, advantage: float, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One line of samples.jsonl. `step` comes first, so that a reader can skip a line unparsed."""
    problem, completion = rollout.problem, rollout.completion
    return {
        "step": step,
        "problem": problem.question,
        "answer": problem.answer,
        "prompt": tokenizer.decode(problem.prompt_ids),
        "response": rollout.text,
        "reward": reward,
        "components": rollout.grade.components,
        "advantage": advantage,
        "right": is_right(rollout, reward),
        "tokens": rollout.length,
        "finished": completion.finished,
        "pieces": pieces(completion.token_ids, tokenizer),
        "logprobs": [round(logprob, 3) + 0.0 for logprob in completion.logprobs],  # no -0.0
    }


def pieces(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text. Joined, the pieces are the text.

    A special token adds nothing. Where several tokens make one character, the last of them adds it.
    Each piece is a difference of two texts that begin at the piece before, because some tokenizers
    strip the space at the start of a text. Most texts are their tokens, decoded one by one, which
    takes a seventh of the time."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    found = tokenizer.batch_decode([[id] for id in token_ids], skip_special_tokens=True)
    if token_ids and "".join(found) == text:
        return found
    found = []
    start = read = 0  # tokens before `read` have their text, and `start` is one piece earlier
    for end in range(1, len(token_ids) + 1):
        known = tokenizer.decode(token_ids[start:read], skip_special_tokens=True)
        text = tokenizer.decode(token_ids[start:end], skip_special_tokens=True)
        if text.endswith("\ufffd") and end < len(token_ids):  # a character is incomplete
            found.append("")
        else:
            found.append(text[len(known) :])
            start, read = read, end
    return found
