"""The page of a run is one file that loads nothing, shows what the records hold, and shows hostile
text as text."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import pytest

from conftest import ROOT
from drgrpo.config import RECIPES
from drgrpo.run import report
from drgrpo.run.files import append_jsonl, write_json
from drgrpo.types import UserError
from test_metrics import UPDATE, row_of

HOSTILE = {
    "end of the script": "</script><script>alert(1)</script>",
    "comment": "<!-- <script>",
    "markup": "<img src=https://example.org/x onerror=alert(1)> &amp; {{ 7 * 7 }}",
    "NUL": "a\x00b",
    "half a surrogate pair": "a\ud800b",
    "right to left": "a\u202egro.elpmaxe\u202c \u200f \u2066",
    "line separators": "a\u2028b\u2029c",
    "escape": "\x1b[31mred",
}
SHOWN = {
    "NUL": "a⟨U+0000⟩b",
    "half a surrogate pair": "a⟨U+D800⟩b",
    "right to left": "a⟨U+202E⟩gro.elpmaxe⟨U+202C⟩ ⟨U+200F⟩ ⟨U+2066⟩",
    "line separators": "a⟨U+2028⟩b⟨U+2029⟩c",
    "escape": "⟨U+001B⟩[31mred",
}


class Page(HTMLParser):
    """Tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.texts.append((self.tags[-1][0] if self.tags else "", text))

    @property
    def data(self) -> dict:
        """What the script draws."""
        (start,) = [i for i, (_, attrs) in enumerate(self.tags) if attrs.get("id") == "data"]
        assert self.tags[start][0] == "script"
        (text,) = [text for _, text in self.texts if text.startswith('{"charts":[{')]
        return json.loads(text)

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))


def metric(step: int) -> dict:
    row = {"step": step, "hours_used": step / 10, "reward_mean": step / 10, "entropy": None}
    row |= {"response_len_correct": 5.0, "response_len_incorrect": 9.0}
    row |= {"seconds": {"rollout": 3.0, "old": 0.0, "train": 1.0, "total": 5.0}}
    return row | {"gb": {"rollout": 2.0, "train": 4.0 + step}}


def evaluation(step: int, **changes) -> dict:
    row = {"step": step, "benchmark": "held_out", "accuracy": step / 10, "interval": [0.0, 0.5]}
    row |= {"samples": 1, "temperature": 0.0, "len_correct": 4.0, "len_incorrect": None}
    return row | {"truncated_frac": 0.125} | changes


def sample(step: int = 1, right: bool = True, **changes) -> dict:
    row = {"step": step, "problem": "q", "answer": "1", "prompt": "Q: q", "response": "ab"}
    row |= {"reward": float(right), "components": {"math": float(right), "f": None}}
    row |= {"advantage": 0.5 if right else -0.5, "right": right, "tokens": 3, "finished": True}
    return row | {"pieces": ["a", "b", ""], "logprobs": [-0.5, -0.25, -0.125]} | changes


def write_run(out, samples, steps=2, evals=None, **settings):
    out.mkdir(exist_ok=True)
    write_json(out / "config.json", asdict(replace(RECIPES["tiny"](), out=str(out), **settings)))
    start = {"resumed_step": 0, "argv": ["train.py", "--recipe", "tiny"], "commit": "abc1234"}
    write_json(out / "run.json", [start])
    append_jsonl(out / "metrics.jsonl", [metric(step) for step in range(1, steps + 1)])
    append_jsonl(out / "eval.jsonl", [evaluation(0), evaluation(2)] if evals is None else evals)
    append_jsonl(out / "samples.jsonl", samples)
    return out


def page_of(out) -> Page:
    return Page(report.write(out).read_text())


# ---- one file


def test_the_page_loads_nothing_and_runs_its_own_script_alone(tmp_path):
    samples = [sample(response=text, pieces=[text]) for text in HOSTILE.values()]
    page = page_of(write_run(tmp_path, [row | {"logprobs": [-1.0]} for row in samples]))
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "style", "background", "poster"}
    assert not [name for name in names if name.startswith("on")]
    source = (ROOT / "drgrpo" / "run" / "report.html.jinja").read_text()
    urls = set(re.findall(r"\w+://[^\"'\s]+", source))
    assert urls == {"http://www.w3.org/2000/svg"}, "a name of SVG's, which nobody loads"
    loads = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import|url\("
    assert not re.search(loads + r"|\| *safe", source)
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    nonces = [attributes["nonce"] for _, attributes in page.tags if "nonce" in attributes]
    assert len(nonces) == 2 and len(set(nonces)) == 1
    assert policy == (
        f"default-src 'none'; style-src 'nonce-{nonces[0]}'; script-src 'nonce-{nonces[0]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    again = page_of(tmp_path)
    assert nonces[0] not in [a.get("nonce") for _, a in again.tags], "a response could learn it"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_shown_as_text(tmp_path, name):
    text, shown = HOSTILE[name], SHOWN.get(name, HOSTILE[name])
    changes = {"pieces": [text], "logprobs": [-1.0], "prompt": text, "answer": text}
    evals = [evaluation(0, benchmark=text)]
    harmless = page_of(write_run(tmp_path / "harmless", [sample()], evals=[evaluation(0)]))
    page = page_of(write_run(tmp_path / "run", [sample(**changes)], evals=evals, system="", lr=1))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    (row,) = page.data["samples"]
    assert (row["texts"], row["prompt"], row["answer"]) == ([shown], shown, shown)
    assert shown in page.text, "the table before and after"


# ---- what it shows


def test_tables_settings_and_machine(tmp_path):
    page = page_of(write_run(tmp_path, [sample()], lr=0.5))
    for part in ("before", "step 2", "0.200", "0.000 to 0.500", "12.5%", "60.0%", "abc1234"):
        assert part in page.text
    assert "train.py --recipe tiny" in page.text and "Step 2 of 100, 0.20 hours" in page.text
    (changed,) = [i for i, (_, a) in enumerate(page.tags) if a.get("class") == "changed"]
    assert "1 of them changed" in page.text and page.tags[changed][0] == "tr"
    phases = report.phase_cells([metric(1), metric(2)])
    assert phases == [["rollout", "3.000", "60.0%", "2.00"], ["train", "1.000", "20.0%", "6.00"]]


def test_curves_hold_every_step_and_the_intervals(tmp_path):
    charts = {c["title"]: c for c in page_of(write_run(tmp_path, [sample()])).data["charts"]}
    assert charts["Reward"]["lines"][0]["points"] == [[1, 0.1], [2, 0.2]]
    (accuracy,) = charts["Accuracy on problems held out"]["lines"]
    assert accuracy == {"name": "held_out, greedy", "points": [[0, 0, 0, 0.5], [2, 0.2, 0, 0.5]]}
    lengths = charts["Response length, tokens"]["lines"]
    values = [(line["name"], line["points"][0]) for line in lengths]
    assert values == [("wrong", [1, 9.0]), ("right", [1, 5.0])]
    assert "Entropy, nats a token" not in charts, "no step has a value"
    time = charts["Seconds of a step by phase"]
    assert time["stacked"] and [line["name"] for line in time["lines"]] == ["rollout", "train"]


def test_every_column_of_a_chart_is_in_metrics_jsonl():
    columns = row_of([UPDATE]).keys()
    assert all(names.keys() <= columns for names in report.CHARTS.values())


def test_every_way_to_sample_has_its_own_line():
    lines = report.accuracy_lines([evaluation(0), evaluation(0, temperature=0.5, samples=4)])
    assert [line["name"] for line in lines] == ["held_out, greedy", "held_out, T=0.5, 4 each"]


def test_the_newest_start_is_open(tmp_path):
    out = write_run(tmp_path, [sample()])
    (first,) = json.loads((out / "run.json").read_text())
    write_json(out / "run.json", [first, first | {"resumed_step": 7}])
    page = page_of(out)
    assert "start 1, after step 0" in page.text and "start 2, after step 7" in page.text
    assert "resumed_step" not in page.text
    details = [attributes for tag, attributes in page.tags if tag == "details"]
    assert ["open" in attributes for attributes in details] == [False, False, True]


def test_lines_and_tabs_of_a_text_stay():
    assert report.visible("a\n\tb\r") == "a\n\tb⟨U+000D⟩"


def test_a_token_without_text_goes_with_the_next_piece_and_the_end_token_is_last():
    pieces, logprobs = ["a", "", "", "😀", "b", ""], [-1.0, -0.25, -0.5, -0.25, -2.0, -0.125]
    shown = report.sample(sample(pieces=pieces, logprobs=logprobs))
    assert shown["texts"] == ["a", "😀", "b", ""]
    assert shown["logprobs"] == [-1.0, -1.0, -2.0, -0.12]
    assert report.sample(sample(pieces=[], logprobs=[]))["texts"] == []


def test_an_answer_of_several_values_is_a_text():
    assert report.sample(sample(answer=["2", "\u202e"]))["answer"] == "['2', '\\u202e']"


def test_a_run_that_has_not_begun_or_was_killed_while_it_wrote_has_a_page(tmp_path):
    page = page_of(write_run(tmp_path / "new", [], steps=0, evals=[]))
    assert "There is no step yet" in page.text and "There is no evaluation" in page.text
    out = write_run(tmp_path / "killed", [sample(1), sample(2)])
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        with open(out / name, "a") as file:
            file.write('{"step": 3, "rew')
    assert [row["step"] for row in page_of(out).data["samples"]] == [1, 2]


def test_rows_of_an_older_version_are_left_out(tmp_path):
    old = {k: v for k, v in sample(1).items() if k not in ("pieces", "logprobs", "right")}
    evals = [evaluation(0), evaluation(2)]
    del evals[0]["interval"]
    data = page_of(write_run(tmp_path, [old, sample(2)], evals=evals)).data
    assert [row["step"] for row in data["samples"]] == [2]
    (accuracy,) = (c for c in data["charts"] if c["title"] == "Accuracy on problems held out")
    assert accuracy["lines"][0]["points"] == [[0, 0], [2, 0.2, 0, 0.5]]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json; name the --out folder"):
        report.write(tmp_path)


@pytest.mark.slow  # it imports torch
def test_the_module_writes_the_page(tmp_path):
    write_run(tmp_path, [sample()])
    command = [sys.executable, "-m", "drgrpo.run.report", tmp_path]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == f"{tmp_path}/report.html\n", process.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_page_that_fails_does_not_end_the_run(tmp_path):
    said = []
    report.refresh(SimpleNamespace(out=tmp_path, say=said.append))
    (line,) = said
    assert line.startswith("WARNING: no report.html (UserError: ") and "the run goes on" in line


# ---- which samples


def test_right_and_wrong_samples_take_turns(tmp_path):
    rows = [sample(right=True)] * 20 + [sample(right=False)] * 3
    shown = page_of(write_run(tmp_path, rows)).data["samples"]
    assert [row["right"] for row in shown] == [True, False] * 3 + [True] * 2


def test_a_long_run_shows_evenly_spaced_steps_within_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MEGABYTES", 0.4)
    tokens = ["word "] * 300
    long = {"pieces": tokens, "logprobs": [-0.123] * 300, "response": "".join(tokens)}
    rows = [sample(step, right=i % 3 == 0, **long) for step in range(1, 41) for i in range(12)]
    page = page_of(write_run(tmp_path, rows, steps=40))
    shown = sorted({row["step"] for row in page.data["samples"]})
    assert shown[0] == 1 and shown[-1] == 40 and 2 < len(shown) < 10
    gaps = [b - a for a, b in pairwise(shown)]
    assert max(gaps) - min(gaps) <= 1
    assert len(json.dumps(page.data["samples"])) < 400_000
    for step in shown:
        kinds = {row["right"] for row in page.data["samples"] if row["step"] == step}
        assert kinds == {True, False}
    monkeypatch.setattr(report, "MEGABYTES", 0)
    assert {row["step"] for row in page_of(tmp_path).data["samples"]} == {1, 40}


def test_steps_are_chosen_with_first_and_last():
    assert report.evenly_spaced([3, 5, 9], 3) == [3, 5, 9]
    assert report.evenly_spaced(list(range(1, 101)), 2) == [1, 100]
    assert report.evenly_spaced(list(range(1, 101)), 4) == [1, 34, 67, 100]


# ---- in a browser


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_draws_curves_and_samples(tmp_path):
    hostile = HOSTILE["end of the script"] + HOSTILE["markup"]
    rows = [sample(1, pieces=[hostile, "b", ""]), sample(1, right=False), sample(2)]
    rows.insert(2, sample(1, right=False, finished=False))
    path = report.write(write_run(tmp_path / "run", rows))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path}/profile", "--dump-dom", path.as_uri()]
    dom = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=120).stdout
    page = Page(dom)
    assert [tag for tag, _ in page.tags].count("figure") == 4
    assert hostile in page.text, "the first response, drawn by the script"
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    for part in ("all 3", "right 1", "wrong 1", "truncated 1", "step 1 ", " 1 of 3 ", "3 tokens"):
        assert part in page.text
    assert "reward 1 (math 1, f failed)" in page.text and "advantage +0.5" in page.text
    titles = [a["title"] for _, a in page.tags if "title" in a]
    assert titles == [
        f"log-prob {p}" for p in ("-0.5, p = 0.607", "-0.25, p = 0.779", "-0.12, p = 0.887")
    ]
    pressed = [a["data-choice"] for _, a in page.tags if a.get("aria-pressed") == "true"]
    assert pressed == ["all", "log-prob"]
