"""Score the weights that a sampler holds on a set of problems: one code path for `train.py` and
`eval.py`."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from drgrpo.answers import MAX_CHARS, extract
from drgrpo.distributed import gather
from drgrpo.evaluation.responses import too_long
from drgrpo.evaluation.scores import columns
from drgrpo.grade import Grade, Grader
from drgrpo.rollout import Sampler
from drgrpo.types import Problem, Rollout, Sampling

GRADE_SECONDS = 5.0  # CPU time of comparing an answer with the truth
VOTE_SECONDS = 1.0  # CPU time of comparing two answers for the majority vote


@dataclass(frozen=True, slots=True)
class Scored:
    """A response with its grade. `vote` is the index of the first sample of the problem whose
    answer is equal. It is None without an answer, and where no vote is asked for."""

    rollout: Rollout
    grade: Grade
    vote: int | None = None


@dataclass(frozen=True, slots=True)
class Graders:
    """Two graders of one rule: `truth` compares answers with the ground truth, and `peers` compares
    them with each other."""

    truth: Grader
    peers: Grader


@contextmanager
def make_graders(rules: set[str], mode: str, reward: str = "math") -> Iterator[dict[str, Graders]]:
    """Graders for each rule. Their workers stop at the end."""
    with ExitStack() as stack:
        graders = {}
        for rule in rules:
            truth = stack.enter_context(Grader(rule, mode, timeout_s=GRADE_SECONDS, reward=reward))
            peers = stack.enter_context(Grader(rule, mode, timeout_s=VOTE_SECONDS))
            graders[rule] = Graders(truth, peers)
        yield graders


def counters(graders: dict[str, Graders]) -> dict[str, int]:
    """How often a limit of time or memory ended a grade, or a comparison of two answers, in this
    process."""
    timeouts = errors = votes = 0
    for each in graders.values():
        timeouts += each.truth.timeouts
        errors += each.truth.errors
        votes += each.peers.timeouts + each.peers.errors
    return {"grader_timeouts": timeouts, "grader_errors": errors, "votes_cut_off": votes}


def evaluate_sets(
    sampler: Sampler,
    grader: Grader,
    eval_sets: dict[str, list[Problem]],
    dropped: dict[str, int],
    samples: int,
    sampling: Sampling,
    step: int,
) -> list[dict]:
    """The rows of `eval.jsonl` for one step of training, one per set. `dropped` counts the problems
    of each set that do not fit.

    All sets go into one call of the sampler, which then waits for the last long response once and
    not once per set."""
    problems = list(chain.from_iterable(eval_sets.values()))
    scored = iter(evaluate(sampler, grader, problems, samples, sampling, step))
    settings = {"samples": samples, "temperature": sampling.temperature}
    settings["max_new_tokens"] = sampling.max_new_tokens
    rows = []
    for name, eval_set in eval_sets.items():
        row = summarize(list(islice(scored, samples * len(eval_set))), dropped[name])
        rows.append({"step": step, "benchmark": name} | row | settings)
    return rows


def summarize(scored: list[Scored], dropped: int = 0) -> dict:
    """The columns of `eval.jsonl`. The `dropped` problems are part of the benchmark, and so they
    count as wrong."""
    rows = [response_row(s, sample=0) for s in scored]
    for i in range(dropped):
        rows += too_long(Problem(-1 - i, "", ""), samples=1)
    return columns(rows)


def evaluate(
    sampler: Sampler,
    grader: Grader,
    problems: list[Problem],
    samples: int,
    sampling: Sampling,
    step: int = 0,
    peers: Grader | None = None,
) -> list[Scored]:
    """`samples` graded responses to each problem, over all processes, in the order of the problems.
    With `peers`, a second grader, every response gets its vote."""
    rollouts, grades = sampler.rollout(problems, samples, sampling, step, grader)
    starts = range(0, len(rollouts), samples)
    votes: list[int | None] = [None] * len(rollouts)
    if peers:
        texts = [r.text for r in rollouts]
        groups = group_equal_answers(peers, [texts[i : i + samples] for i in starts])
        votes = list(chain.from_iterable(groups))
    scored = [
        Scored(rollout, grade.result(), vote)
        for rollout, grade, vote in zip(rollouts, grades, votes, strict=True)
    ]
    by_problem = gather([scored[i : i + samples] for i in starts], sampler.tp)
    return list(chain.from_iterable(by_problem))


def answer(
    sampler: Sampler, graders: Graders, problems: list[Problem], samples: int, sampling: Sampling
) -> list[dict]:
    """The rows of `responses.jsonl` for these problems, in their order. A problem without
    `prompt_ids` is too long for the model."""
    fitting = [p for p in problems if p.prompt_ids]
    peers = graders.peers if samples > 1 else None
    scored = iter(evaluate(sampler, graders.truth, fitting, samples, sampling, peers=peers))
    rows = []
    for p in problems:
        if p.prompt_ids:
            rows += [response_row(next(scored), k) for k in range(samples)]
        else:
            rows += too_long(p, samples)
    return rows


def response_row(scored: Scored, sample: int) -> dict:
    """A row of `responses.jsonl`. Its reward is that of `--reward` if this names a function."""
    r, grade = scored.rollout, scored.grade
    more = {"reward": grade.reward, "components": grade.components}
    return (more if grade.components.keys() - {"math"} else {}) | {
        "id": r.problem.id,
        "sample": sample,
        "problem": r.problem.question,
        "answer": r.problem.answer,
        "response": r.text,
        "score": grade.score,
        "parsed": grade.parsed,
        "vote": scored.vote,
        "tokens": r.length,
        "finished": r.completion.finished,
    }


# ---- the majority vote


def group_equal_answers(grader: Grader, texts: list[list[str]]) -> list[list[int | None]]:
    """For each response to each problem, the index of the first response whose answer is equal, or
    None without an answer.

    The ground truth plays no part. In each round the first answer without a group is compared with
    the rest, for all problems at once. An answer too long for the grader is a group of its own."""
    problems = [Votes(group, grader) for group in texts]
    while undecided := [votes for votes in problems if votes.ungrouped]:
        rounds = [(votes, votes.compare()) for votes in undecided]
        for votes, comparisons in rounds:
            votes.settle(comparisons)
    return [votes.first_equal for votes in problems]


class Votes:
    """The responses to one problem, while their answers are compared."""

    def __init__(self, texts: list[str], grader: Grader) -> None:
        self.texts, self.grader = texts, grader
        self.answers = [extract(text, grader.rule) or "" for text in texts]
        self.first_equal = [i if a.strip() else None for i, a in enumerate(self.answers)]
        self.ungrouped = [
            i for i, a in enumerate(self.answers) if a.strip() and len(a) <= MAX_CHARS
        ]

    def compare(self) -> list[Future[Grade]]:
        """Start comparing the first ungrouped answer with the other ones."""
        first, *others = self.ungrouped
        return [self.grader.submit(self.texts[i], self.answers[first]) for i in others]

    def settle(self, comparisons: list[Future[Grade]]) -> None:
        """Put the answers that are equal to the first one into its group."""
        first, *others = self.ungrouped
        self.ungrouped = []
        for i, comparison in zip(others, comparisons, strict=True):
            if comparison.result().score > 0:
                self.first_equal[i] = first
            else:
                self.ungrouped.append(i)
