"""The benchmark of the head: the same gradients from every contender, nothing timed that is wrong,
skips that show.

    pytest tests/test_bench_linear_drgrpo.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_linear_drgrpo as bench
from bench import harness

ROOT = Path(__file__).parents[1]
OURS = "fused (this repository)"
ON_CPU = [OURS, "torch, fp32 upcast", "torch, cross_entropy", "F.linear_cross_entropy"]


@pytest.mark.parametrize("name", ON_CPU)
def test_every_contender_computes_the_same_gradient(name):
    """The equal terms of the comparison: Dr. GRPO on-policy with advantage 1 has the gradient of
    the mean cross-entropy."""
    if name.startswith("F.") and not hasattr(torch.nn.functional, name.removeprefix("F.")):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    case = bench.make_case(64, 16, 300, "cpu")
    errors = bench.errors(bench.CONTENDERS[name], case, bench.exact(case))
    assert max(errors.values()) <= 1e-5


def test_a_row_per_contender_with_numbers_or_a_reason(monkeypatch):
    monkeypatch.setitem(bench.CONTENDERS, "broken", lambda case: 1 / 0)
    monkeypatch.setitem(bench.CONTENDERS, "absent", lambda case: __import__("no_such_package"))
    names = ["3 bare GEMMs", OURS, "CCE", "broken", "absent"]
    rows = {row["contender"]: row for row in bench.measure("tiny", 64, "cpu", names, repeats=3)}
    assert list(rows) == names
    ours, floor = rows[OURS], rows["3 bare GEMMs"]
    assert ours["step_ms"]["p20"] <= ours["step_ms"]["p50"] <= ours["step_ms"]["p80"]
    assert ours["step_ratio"] == ours["step_ms"]["p50"] / floor["step_ms"]["p50"]
    assert floor["logprob_ratio"] == 1
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
        bench.measure("tiny", 64, "cpu", ["3 bare GEMMs", OURS], repeats=1)


def test_a_failure_of_the_fused_head_is_not_a_skip(monkeypatch):
    monkeypatch.setitem(bench.CONTENDERS, OURS, lambda case: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.measure("tiny", 64, "cpu", ["3 bare GEMMs", OURS], repeats=1)


def test_fused_memory_is_the_chunk_and_the_gradients():
    """On the CPU too, the logits of all tokens never exist at once; the naive program keeps several
    copies of them."""
    T, (D, V) = 1024, bench.MODELS["small"]
    names = ["3 bare GEMMs", OURS, "torch, fp32 upcast"]
    rows = {row["contender"]: row for row in bench.measure("small", T, "cpu", names, 1)}
    chunk = bench.head.default_chunk_tokens(T, V, torch.device("cpu"))
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
    assert result["best"] == {"block_v": 128, "num_warps": 4, "chunk_logits": 256 * 8192}
    assert result["gain"] == 0.5
    assert {row["model"] for row in result["rows"]} == {"tiny", "small"}
    assert len(result["rows"]) == 2 * (3 + 4)
    assert bench.head.sizes_on is sizes_on


def test_sizes_tuned_for_a_card_are_used_on_that_card_only(monkeypatch):
    tuned, cuda = bench.head.Sizes(4096, 16, 8192 * 151_936), torch.device("cuda", 0)
    monkeypatch.setattr(bench.head, "TUNED", {(9, 0): tuned})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, chunk in (((9, 0), 8192), ((8, 0), 4096)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (bench.head.sizes_on(cuda) == tuned) == (capability == (9, 0))
        assert bench.head.default_chunk_tokens(8192, 151_936, cuda) == chunk
    assert bench.head.sizes_on(torch.device("cpu")) != tuned


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
    options = "--device cpu --models tiny --tokens 128 --repeats 2 --sweep --out"
    command = [sys.executable, "-m", "bench.bench_linear_drgrpo", *options.split()]
    command += [str(tmp_path / "result"), "--only", OURS, "CCE"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [row["contender"] for row in result["rows"]] == ["3 bare GEMMs", OURS, "CCE"]
    assert {"device", "torch", "triton", "commit", "date"} <= set(result["where"])
    assert "skipped CCE: needs CUDA" in done.stdout
    assert result["sweep"]["tuned"] is None, "what a CPU finds is no advice for a card"
    assert "the default stays" in done.stdout
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
