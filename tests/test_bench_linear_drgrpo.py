"""The benchmark of the head: the same results from every contender, nothing timed that is wrong,
skips that show.

    pytest tests/test_bench_linear_drgrpo.py
"""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import bench_linear_drgrpo as bench
from bench import harness

ROOT = Path(__file__).parents[1]
OURS = "fused (this repository)"
SLOW = ("torch.compile",)
ON_CPU = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in bench.CONTENDERS
    if name not in (*bench.FLOORS, *bench.NEED_CUDA)
]


@pytest.mark.parametrize("case_name", bench.CASES)
@pytest.mark.parametrize("name", ON_CPU)
def test_every_adapter_that_a_cpu_can_run_computes_the_same(name, case_name):
    """The equal terms of the comparison, on the same inputs, against float64. 768 tokens are three
    responses for Liger."""
    case = bench.make_case(768, 16, 300, "cpu", case_name)
    truth = bench.exact(case)
    try:
        errors = bench.errors(bench.CONTENDERS[name], case, truth)
    except (bench.Skip, ImportError) as why:
        pytest.skip(str(why))
    expected = {"logprob": {"logprob_rms"}, "frozen-head": {"dhidden"}}
    assert errors.keys() == expected.get(case_name, {"dhidden", "dweight"})
    assert max(errors.values()) <= 1e-5


def test_who_takes_part_in_which_case(monkeypatch):
    """Cross-entropies know no ratio, and they return one number. Logits of 16 bits need inputs of
    16 bits. Nothing else of this repository and of torch may skip."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    no_ratio, no_logprob = "takes no old log-probs", "gives no log-probs alone"
    known = [name for name in bench.CONTENDERS if name.startswith(("fused", "torch", "bare"))]
    skipped = {}
    for name, case_name in itertools.product(known, bench.CASES):
        case = bench.make_case(8, 4, 20, "cpu", case_name)
        try:
            bench.runner(bench.CONTENDERS[name], case)
        except bench.Skip as why:
            skipped[name, case_name] = str(why)
    fp32 = "the inputs are fp32, and so are the logits of fused"
    for_fp32 = itertools.product(("fused, fp32 logits", "fused, shifted logits"), bench.CASES)
    assert skipped == {
        ("torch, cross_entropy", "old-logprob"): no_ratio,
        ("torch, cross_entropy", "logprob"): no_logprob,
        **dict.fromkeys(for_fp32, fp32),
    }


def test_shifted_and_fp32_logits_have_the_more_exact_logprobs():
    case = bench.make_case(64, 64, 5000, "cpu", "logprob")
    halves = {x: getattr(case, x).detach().bfloat16() for x in ("hidden", "weight")}
    case = replace(case, **halves)
    names = [OURS, "fused, shifted logits", "fused, fp32 logits"]
    truth = bench.exact(case)
    errors = [bench.errors(bench.CONTENDERS[name], case, truth)["logprob_rms"] for name in names]
    assert errors[0] > 3 * errors[1] > 30 * errors[2]


def test_a_tenth_of_the_old_logprobs_is_clipped_and_rounding_clips_no_other():
    case = bench.make_case(2000, 16, 300, "cpu", "old-logprob")
    logprob = bench.naive_logprob(*case.inputs).detach()
    ratio = (logprob - case.old_logprob).exp()
    clipped = ratio > 1 + bench.CLIP
    assert 0.07 < clipped.float().mean() < 0.13  # four standard deviations
    low, high = (ratio[where].log() for where in (~clipped, clipped))
    assert (low - math.log(0.9)).abs().max() < 1e-4 and (high - 0.5).abs().max() < 1e-4
    (dhidden, _), T = bench.exact(case), len(case.target)
    assert (dhidden[clipped] == 0).all() and (dhidden[~clipped].norm(dim=1) > 1e-3 / T).any()


@pytest.mark.parametrize("name", [*bench.FLOORS, OURS])
def test_a_frozen_head_costs_no_weight_gradient(name):
    T, D, V = 64, 128, 4000
    peaks = []
    for case_name in ("on-policy", "frozen-head"):
        run = bench.runner(bench.CONTENDERS[name], bench.make_case(T, D, V, "cpu", case_name))
        peaks.append(harness.peak_memory(run, "cpu"))
    assert peaks[0] - peaks[1] >= 0.9 * 4 * V * D


def test_a_row_per_contender_with_numbers_or_a_reason(monkeypatch):
    monkeypatch.setitem(bench.CONTENDERS, "broken", lambda case: 1 / 0)
    monkeypatch.setitem(bench.CONTENDERS, "absent", lambda case: __import__("no_such_package"))
    names = ["bare GEMMs", OURS, "CCE", "broken", "absent"]
    rows = {row["contender"]: row for row in bench.measure("tiny", 64, "cpu", names, repeats=3)}
    assert list(rows) == names
    ours, floor = rows[OURS], rows["bare GEMMs"]
    assert ours["ms"]["p20"] <= ours["ms"]["p50"] <= ours["ms"]["p80"]
    assert ours["ratio"] == ours["ms"]["p50"] / floor["ms"]["p50"]
    assert ours["errors"]["dweight"] <= 1e-5
    assert ours["host_syncs"] is None
    assert ours["peak_bytes"] > 0
    assert rows["CCE"]["skipped"] == "needs CUDA"
    assert "ZeroDivisionError" in rows["broken"]["skipped"]
    assert "no_such_package" in rows["absent"]["skipped"]


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = bench.head.linear_drgrpo_loss

    def wrong(*args, **options):
        return right(*args, **options, temperature=1.001)

    monkeypatch.setattr(bench.head, "linear_drgrpo_loss", wrong)
    with pytest.raises(SystemExit, match="not timing a wrong kernel: dhidden"):
        bench.measure("tiny", 64, "cpu", ["bare GEMMs", OURS], repeats=1)


def test_a_failure_of_the_fused_head_is_not_a_skip(monkeypatch):
    monkeypatch.setitem(bench.CONTENDERS, OURS, lambda case: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.measure("tiny", 64, "cpu", ["bare GEMMs", OURS], repeats=1)


def test_fused_memory_is_the_chunk_and_the_gradients():
    """On the CPU too, the logits of all tokens never exist at once; the naive program keeps several
    copies of them."""
    T, (D, V) = 1024, bench.MODELS["small"]
    names = ["bare GEMMs", OURS, "torch, fp32 upcast"]
    rows = {row["contender"]: row for row in bench.measure("small", T, "cpu", names, 1)}
    chunk = bench.head.default_chunk_tokens(T, D, V, bench.head.sizes_on(torch.device("cpu")))
    buffers = 4 * (2 * chunk * V + V * D + T * D)  # logits and their exponentials, dW, dX
    assert rows[OURS]["peak_bytes"] <= 1.2 * buffers + 2**20
    assert rows[OURS]["peak_bytes"] < rows["torch, fp32 upcast"]["peak_bytes"] / 4


def test_the_sweep_times_what_it_names_and_takes_the_fastest(monkeypatch):
    """Made-up times: (128, 4) is the fastest program, 256 tokens the fastest chunk, and only with
    that program."""
    monkeypatch.setitem(bench.PROGRAMS, "cpu", [(64, 2), (128, 4)])
    used, sizes_on = [], bench.head.sizes_on

    def loss(*_, **__):
        used.append(bench.head.sizes_on(None))
        return None, {}

    def fake_times(runs, device, repeats):
        times = {}
        for key, run in runs.items():
            run()
            sizes = used[-1]
            assert sizes == key[0], "it timed other sizes than it names"
            gain = 4 * (sizes[:2] == (128, 4)) + (sizes.chunk_logits == 256 * 8192)
            times[key] = [10.0 - gain]
        return times

    monkeypatch.setattr(bench.head, "linear_drgrpo_loss", loss)
    monkeypatch.setattr(bench.Case, "backward", lambda self, loss: None)
    monkeypatch.setattr(bench, "interleaved", fake_times)
    result = bench.sweep(["tiny", "small"], 64, "cpu", repeats=1)
    best = bench.head.Sizes(128, 4, 256 * 8192)
    assert result["best"] == best._asdict()
    assert result["gain"] == 0.5
    assert {row["model"] for row in result["rows"]} == {"tiny", "small"}
    assert len(result["rows"]) == 2 * (3 + 4)
    assert bench.head.sizes_on is sizes_on


def test_sizes_tuned_for_a_card_are_used_on_that_card_only(monkeypatch):
    tuned, cuda = bench.head.Sizes(4096, 16, 4096 * 151_936), torch.device("cuda", 0)
    monkeypatch.setattr(bench.head, "TUNED", {(9, 0): tuned})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, largest in ((9, 4096), (8, 8192)):
        card = dict(major=major, minor=0, multi_processor_count=132, total_memory=80 << 30)
        properties = SimpleNamespace(**card)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        sizes = bench.head.sizes_on(cuda)
        assert (sizes == tuned._replace(processors=132)) == (major == 9)
        chunk = bench.head.default_chunk_tokens(8192, 1536, 151_936, sizes)
        assert largest // 2 < chunk <= largest
    assert bench.head.sizes_on(torch.device("cpu"))[:3] != tuned[:3]


def test_targets_are_samples_of_the_softmax():
    case = bench.make_case(4000, 4, 5, "cpu")
    p = (case.hidden @ case.weight.T).softmax(-1).detach()
    counts = torch.bincount(case.target, minlength=5) / 4000
    assert (counts - p.mean(0)).abs().max() < 0.03  # four standard deviations of a count


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        for _ in range(3):
            x = torch.zeros(2**20)  # 4 MB, of which two are alive while the name changes hands
        return x

    assert 8 * 2**20 <= harness.peak_memory(run, "cpu") < 8.1 * 2**20


def test_contenders_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = harness.interleaved(runs, "cpu", 3)
    assert order == list("ababab")
    assert [len(t) for t in times.values()] == [3, 3]


def test_quantiles_and_table():
    assert harness.quantiles([5.0]) == {"p20": 5.0, "p50": 5.0, "p80": 5.0}
    assert harness.quantiles(list(range(11))) == pytest.approx({"p20": 2, "p50": 5, "p80": 8})
    table = harness.markdown(["n", "x"], [["r", 1], ["s", 2.25]])
    assert table == "| n | x |\n| --- | ---: |\n| r | 1 |\n| s | 2.2 |"


@pytest.mark.slow
def test_command_writes_json_and_picture(tmp_path):
    options = "--device cpu --models tiny --tokens 128 --repeats 2 --sweep"
    options += " --cases on-policy logprob --out"
    command = [sys.executable, "-m", "bench.bench_linear_drgrpo", *options.split()]
    command += [str(tmp_path / "result"), "--only", OURS, "CCE"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    rows = itertools.product(("on-policy", "logprob"), ("bare GEMMs", OURS, "CCE"))
    assert [(row["case"], row["contender"]) for row in result["rows"]] == list(rows)
    assert {"device", "torch", "triton", "commit", "date"} <= set(result["where"])
    assert "skipped CCE: needs CUDA" in done.stdout
    assert result["sweep"]["tuned"] is None, "what a CPU finds is no advice for a card"
    assert "the default stays" in done.stdout
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
