"""The end of a run shows where it began and where it ended."""

from rich.console import Console

from drgrpo.run.summary import before_and_after


def test_the_table_shows_first_and_last_evaluation(capsys):
    row = {"benchmark": "held_out", "samples": 1, "len_correct": 18.0, "len_incorrect": None}
    accuracies = {0: 0.25, 10: 0.5, 20: 0.75}
    rows = [
        row | {"step": step, "temperature": t, "accuracy": accuracy + t / 100, "truncated_frac": 0}
        for step, accuracy in accuracies.items()
        for t in (0.0, 1.0)
    ]
    Console(width=120).print(before_and_after(rows, "run"))
    shown = capsys.readouterr().out
    for part in ("greedy", "T=1, 1 each", "0.250", "0.760", "step 20"):
        assert part in shown
    assert "0.500" not in shown and "step 10" not in shown
