"""Score the weights that an engine holds on a set of problems: one code path for `train.py` and
`eval.py`."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from drgrpo.distributed import gather, share
from drgrpo.evaluation.responses import too_long
from drgrpo.evaluation.scores import columns
from drgrpo.grade import MAX_CHARS, Grade, Grader, extract
from drgrpo.rollout import rollout
from drgrpo.types import Problem, Rollout, Sampling

GRADE_SECONDS, VOTE_SECONDS = (
    5.0,
    1.0,
)  # of CPU time; what two wrong answers have in common is worth less of it


@dataclass(frozen=True, slots=True)
class Scored:
    """A response with its grade, and the first sample of its problem that gives an equal answer
    (None: not asked for, or no answer)."""

    rollout: Rollout
    grade: Grade
    vote: int | None = None


@dataclass(frozen=True, slots=True)
class Judge:
    """Two graders of one rule: of answers against the truth, and of answers against each other."""

    grader: Grader
    ballot: Grader


@contextmanager
def judges(rules: set[str], mode: str):
    """A `Judge` for each rule, its workers stopped at the end."""
    with ExitStack() as stack:
        limits = (GRADE_SECONDS, VOTE_SECONDS)
        yield {
            rule: Judge(
                *(stack.enter_context(Grader(rule, mode=mode, timeout_s=s)) for s in limits)
            )
            for rule in rules
        }


def counters(judge: dict[str, Judge]) -> dict[str, int]:
    """How often a limit of time or memory ended a grade, or a comparison of two answers, in this
    process."""
    return {
        "grader_timeouts": sum(j.grader.timeouts for j in judge.values()),
        "grader_errors": sum(j.grader.errors for j in judge.values()),
        "votes_cut_off": sum(j.ballot.timeouts + j.ballot.errors for j in judge.values()),
    }


def evaluate(
    engine,
    tokenizer,
    grader: Grader,
    problems: list[Problem],
    samples: int,
    sampling: Sampling,
    seed: int,
    step: int = 0,
    tp: int = 1,
    ballot: Grader | None = None,
) -> list[Scored]:
    """`samples` graded responses to each problem, over all processes, in the order of the problems.
    With a `ballot`, a second grader that compares the answers to one problem with each other, every
    response gets its vote."""
    order = []  # responses finish in any order, and are graded while others are sampled

    def submit(i: int, r: Rollout) -> None:
        order.append(i)
        grader.submit(r.text, r.problem.answer)

    rollouts = rollout(
        engine, tokenizer, share(problems, tp), samples, sampling, seed, step, submit
    )
    graded = dict(zip(order, grader.collect(), strict=True))
    texts = [[r.text for r in rollouts[i : i + samples]] for i in range(0, len(rollouts), samples)]
    votes = (
        [v for group in vote(ballot, texts) for v in group] if ballot else [None] * len(rollouts)
    )
    scored = [Scored(r, graded[i], v) for i, (r, v) in enumerate(zip(rollouts, votes, strict=True))]
    whole = gather([scored[i : i + samples] for i in range(0, len(scored), samples)], tp)
    return [s for group in whole for s in group]


def vote(ballot: Grader, texts: list[list[str]]) -> list[list[int | None]]:
    """For each response to a problem the index of the first one whose answer the grader finds
    equal; None without an answer.

    Round by round the first answer that is left collects its equals, in all groups at once. The
    ground truth plays no part. An answer too long for the grader to compare stands for itself
    alone."""
    answers = [[extract(text, ballot.rule) for text in group] for group in texts]
    votes = [[i if a and a.strip() else None for i, a in enumerate(group)] for group in answers]
    left = [
        [i for i, v in enumerate(vs) if v is not None and len(a[v]) <= MAX_CHARS]
        for vs, a in zip(votes, answers, strict=True)
    ]
    while any(left):
        for g, indices in enumerate(left):
            for i in indices[1:]:
                ballot.submit(texts[g][i], answers[g][indices[0]])
        grades = iter(ballot.collect())
        for g, indices in enumerate(left):
            equal = {i for i in indices[1:] if next(grades).score > 0}
            for i in equal:
                votes[g][i] = indices[0]
            left[g] = [i for i in indices[1:] if i not in equal]
    return votes


def answer(
    engine,
    tokenizer,
    judge: Judge,
    problems: list[Problem],
    samples: int,
    sampling: Sampling,
    seed: int,
    tp: int = 1,
) -> list[dict]:
    """The rows of `responses.jsonl` for these problems, in their order. A problem without
    `prompt_ids` is too long to ask."""
    asked = [p for p in problems if p.prompt_ids]
    ballot = judge.ballot if samples > 1 else None
    scored = iter(
        evaluate(
            engine, tokenizer, judge.grader, asked, samples, sampling, seed, tp=tp, ballot=ballot
        )
    )
    rows = []
    for p in problems:
        rows += (
            [response_row(next(scored), k) for k in range(samples)]
            if p.prompt_ids
            else too_long(p, samples)
        )
    return rows


def response_row(scored: Scored, sample: int) -> dict:
    r = scored.rollout
    return {
        "id": r.problem.id,
        "sample": sample,
        "problem": r.problem.question,
        "answer": r.problem.answer,
        "response": r.text,
        "score": scored.grade.score,
        "parsed": scored.grade.parsed,
        "vote": scored.vote,
        "tokens": r.length,
        "finished": r.completion.finished,
    }


def summarize(scored: list[Scored], dropped: int = 0) -> dict:
    """The columns of `eval.jsonl`. Problems dropped for their length count as wrong: they are part
    of the benchmark."""
    unasked = [row for i in range(dropped) for row in too_long(Problem(-1 - i, "", ""), samples=1)]
    return columns([response_row(s, 0) for s in scored] + unasked)
