"""Score the weights that an engine holds on a set of problems: one code path for `train.py` and `eval.py`."""

from dataclasses import dataclass
from statistics import fmean

from drgrpo.distributed import gather, share
from drgrpo.engine import Sampling
from drgrpo.grade import Grade, Grader
from drgrpo.rollout import rollout
from drgrpo.types import Problem, Rollout


@dataclass(frozen=True, slots=True)
class Scored:
    """A response with its grade."""

    rollout: Rollout
    grade: Grade


def evaluate(engine, tokenizer, grader: Grader, problems: list[Problem], samples: int, sampling: Sampling, seed: int,
             step: int = 0, tp: int = 1) -> list[Scored]:  # fmt: skip
    """`samples` graded responses to each problem, over all processes, in the order of the problems."""
    rollouts = rollout(engine, tokenizer, share(problems, tp), samples, sampling, seed, step)
    grades = grader([r.text for r in rollouts], [r.problem.answer for r in rollouts])
    scored = [Scored(r, g) for r, g in zip(rollouts, grades, strict=True)]
    groups = gather([scored[i : i + samples] for i in range(0, len(scored), samples)], tp)
    return [s for group in groups for s in group]


def summarize(scored: list[Scored], dropped: int = 0) -> dict:
    """The columns of `eval.jsonl`. Problems dropped for their length count as wrong: they are part of the benchmark."""
    samples = len(scored) / len({s.rollout.problem.id for s in scored}) if scored else 1
    lengths = {c: [s.rollout.length for s in scored if (s.grade.score > 0) is c] for c in (True, False)}
    return {
        "accuracy": len(lengths[True]) / (len(scored) + dropped * samples),
        "n": round(len(scored) / samples) + dropped,
        "dropped": dropped,
        "len_correct": mean(lengths[True]),
        "len_incorrect": mean(lengths[False]),
        "truncated_frac": mean([not s.rollout.completion.finished for s in scored]),
        "unparsed_frac": mean([not s.grade.parsed for s in scored]),
    }


def mean(values: list) -> float | None:
    """None without values: JSON has no NaN."""
    return fmean(values) if values else None
