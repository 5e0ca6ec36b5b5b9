"""Scores are means over what was asked, dropped problems included; equal answers to a problem are
one vote, whatever the truth is."""

import pytest

from drgrpo.evaluation.evaluate import Scored, answer, counters, evaluate, judges, summarize, vote
from drgrpo.grade import Grade, Grader
from drgrpo.types import Completion, Problem, Request, Rollout, Sampling


def scored(
    problem_id: int, score: float, length: int, finished: bool = True, parsed: bool = True
) -> Scored:
    completion = Completion([1] * length, [0.0] * length, finished)
    return Scored(Rollout(Problem(problem_id, "q", "1"), completion, ""), Grade(score, parsed))


def test_columns():
    row = summarize(
        [
            scored(0, 1, 4),
            scored(1, 0, 10),
            scored(2, 0, 20, finished=False, parsed=False),
            scored(3, 1, 8),
        ]
    )
    assert row == {
        "accuracy": 0.5,
        "n": 4,
        "dropped": 0,
        "len_correct": 6,
        "len_incorrect": 15,
        "truncated_frac": 0.25,
        "unparsed_frac": 0.25,
    }


def test_problems_too_long_for_the_model_count_as_wrong():
    row = summarize([scored(0, 1, 4), scored(1, 1, 4)], dropped=2)
    assert (row["accuracy"], row["n"], row["dropped"]) == (0.5, 4, 2)
    several = [scored(i, 1, 4) for i in (0, 1) for _ in range(3)]
    assert summarize(several, dropped=2)["accuracy"] == 0.5


def test_lengths_without_answers_are_none():
    assert summarize([scored(0, 0, 5)])["len_correct"] is None


class Oracle:
    """Knows the answer to every second problem."""

    def generate(self, requests: list[Request], sampling: Sampling, on_finish):
        answers = [b"#%d" % (r.prompt_ids[0] - 15 if r.prompt_ids[0] % 2 else 0) for r in requests]
        from drgrpo.tiny.tokenizer import byte_tokenizer

        ids = [byte_tokenizer()(a.decode()).input_ids for a in answers]
        completions = [Completion(i, [0.0] * len(i), True) for i in ids]
        for i in reversed(range(len(completions))):  # a sampler finishes in any order
            on_finish(i, completions[i])
        return completions


@pytest.mark.parametrize("samples", [1, 2])
def test_every_problem_is_answered_graded_and_returned_in_order(group_of_one, tokenizer, samples):
    digits = {str(d): tokenizer(str(d)).input_ids for d in range(1, 9)}
    problems = [Problem(int(d), d, str(ids[0] - 15), ids) for d, ids in digits.items()]
    with Grader("hash") as grader:
        result = evaluate(
            Oracle(),
            tokenizer,
            grader,
            problems,
            samples,
            Sampling(max_new_tokens=4, stop_token_ids=()),
            0,
        )
    assert [s.rollout.problem.id for s in result] == [
        p.id for p in problems for _ in range(samples)
    ]
    assert [s.grade.score for s in result] == [
        p.prompt_ids[0] % 2 for p in problems for _ in range(samples)
    ]
    assert summarize(result)["accuracy"] == 0.5
    assert summarize(result)["n"] == 8


def test_a_process_without_problems_has_nothing_to_say(group_of_one, tokenizer):
    with Grader("hash") as grader:
        assert (
            evaluate(
                Oracle(), tokenizer, grader, [], 1, Sampling(max_new_tokens=4, stop_token_ids=()), 0
            )
            == []
        )


def test_a_prompt_that_does_not_fit_has_rows_without_a_response(group_of_one, tokenizer):
    asked, unasked = Problem(3, "2", "2", tokenizer("2").input_ids), Problem(1, "long", "5")
    with judges({"hash"}, "correct") as judge:
        sampling = Sampling(max_new_tokens=4, stop_token_ids=())
        rows = answer(Oracle(), tokenizer, judge["hash"], [unasked, asked], 2, sampling, 0)
    assert [(r["id"], r["sample"], r["response"]) for r in rows] == [
        (1, 0, None),
        (1, 1, None),
        (3, 0, "#2"),
        (3, 1, "#2"),
    ]
    assert rows[0]["score"] == 0 and rows[2]["vote"] == rows[3]["vote"] == 0


def test_answers_equal_as_mathematics_are_one_vote():
    boxed = [
        r"\boxed{\frac12}",
        r"so \boxed{0.5}",
        "no answer",
        r"\boxed{3}",
        r"\boxed{1/2}",
        r"\boxed{}",
        r"\boxed{3.0}",
    ]
    with Grader("boxed") as ballot:
        assert vote(ballot, [boxed, [r"\boxed{3}"], []]) == [[0, 0, None, 3, 0, None, 3], [0], []]


def test_answers_too_long_to_compare_stand_for_themselves():
    long = r"\boxed{" + "1" * 2000 + "}"
    with Grader("boxed") as ballot:
        assert vote(ballot, [[long, long, r"\boxed{2}", r"\boxed{2}"]]) == [[0, 1, 2, 2]]


def test_an_answer_that_hangs_the_comparison_is_cut_off_and_counted():
    texts = [r"\boxed{\int_0^{10} \sin(x^{9999})^{9999} dx}", r"\boxed{2x}"]
    with judges({"boxed"}, "correct") as judge:
        assert vote(judge["boxed"].ballot, [texts, [r"\boxed{2x}", r"\boxed{x + x}"]]) == [
            [0, 1],
            [0, 0],
        ]
        assert counters(judge) == {"grader_timeouts": 0, "grader_errors": 0, "votes_cut_off": 1}
