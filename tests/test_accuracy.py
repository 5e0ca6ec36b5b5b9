"""The table before and after shows where a run began and where it ended."""

from drgrpo.run.accuracy import HEADINGS, before_and_after

ROW = {"benchmark": "held_out", "samples": 1, "len_correct": 18.0, "len_incorrect": None}
ACCURACIES = {0: 0.25, 10: 0.5, 20: 0.75}


def test_the_table_shows_first_and_last_evaluation_with_their_intervals():
    rows = []
    for step, accuracy in ACCURACIES.items():
        for t in (0.0, 1.0):
            row = {"step": step, "temperature": t, "accuracy": accuracy + t / 100}
            row |= {"truncated_frac": 0, "interval": [accuracy - 0.1, accuracy + 0.1]}
            rows.append(ROW | row)
    assert before_and_after(rows) == [
        ["held_out", "greedy", "before", "0.250", "0.150 to 0.350", "18.0", "-", "0.0%"],
        ["held_out", "greedy", "step 20", "0.750", "0.650 to 0.850", "18.0", "-", "0.0%"],
        ["held_out", "T=1, 1 each", "before", "0.260", "0.150 to 0.350", "18.0", "-", "0.0%"],
        ["held_out", "T=1, 1 each", "step 20", "0.760", "0.650 to 0.850", "18.0", "-", "0.0%"],
    ]
    assert len(HEADINGS) == 8


def test_rows_from_before_the_intervals_have_a_dash():
    row = ROW | {"step": 0, "temperature": 0.0, "accuracy": 0.5, "truncated_frac": None}
    assert before_and_after([row])[0] == [
        *("held_out", "greedy", "before", "0.500", "-", "18.0", "-", "-")
    ]


def test_evaluations_that_sample_otherwise_have_rows_of_their_own():
    """An evaluation that is alone has one row."""
    row = ROW | {"temperature": 1.0, "truncated_frac": 0.5}
    rows = [row | {"step": step, "accuracy": step / 8, "samples": 1 + step} for step in (0, 4)]
    assert [cells[:4] for cells in before_and_after(rows)] == [
        ["held_out", "T=1, 1 each", "before", "0.000"],
        ["held_out", "T=1, 5 each", "step 4", "0.500"],
    ]
