"""Rollouts on disk: dumped by one run, trained on by another that then needs no sampler to be the same."""

import json
from pathlib import Path

from drgrpo.types import Completion, Problem, Rollout, UserError


def dump(folder: Path, step: int, rollouts: list[Rollout]) -> None:
    """One JSON line per rollout, group by group, in FOLDER/step-NNNNNN.jsonl. Floats survive exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"problem": r.problem.id, "question": r.problem.question, "token_ids": r.completion.token_ids,
         "logprobs": r.completion.logprobs, "finished": r.completion.finished, "text": r.text}
        for r in rollouts
    ]  # fmt: skip
    (folder / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(folder: str | Path, step: int, problems: list[Problem]) -> list[Rollout]:
    """The dumped rollouts of a step. UserError if there are none, or if they answer other problems."""
    path = Path(folder) / f"step-{step:06d}.jsonl"
    if not path.is_file():
        raise UserError(f"--replay {folder} holds no {path.name}; dump a run of as many steps with --dump-rollouts")
    by_id = {p.id: p for p in problems}
    rollouts = []
    for row in map(json.loads, path.read_text().splitlines()):
        problem = by_id.get(row["problem"])
        if problem is None or problem.question != row["question"]:
            raise UserError(f"{path}: problem {row['problem']} is not that of --train-data; use the data it was dumped with")
        rollouts.append(Rollout(problem, Completion(row["token_ids"], row["logprobs"], row["finished"]), row["text"]))
    return rollouts
