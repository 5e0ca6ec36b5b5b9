"""The compiled row kernel keeps its promises on sm_80, sm_90 and sm_100, on any machine; and the
report can tell when not.

pytest tests/test_static_report.py
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.static_report import (
    DEVICES,
    SHAPES,
    VARIANTS,
    Compiled,
    Sweep,
    bits,
    cost,
    disassemble,
    loops,
    predict,
    sweeps,
)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One run of the command, under the interpreter's variable, which it must drop for itself."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    command = [sys.executable, "-m", "bench.static_report", "--json", str(path)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert path.exists(), done.stderr
    result = json.loads(path.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    return done, result


@pytest.mark.slow
def test_every_variant_compiles_and_breaks_no_rule(report):
    done, result = report
    assert done.returncode == 0 and result["broken"] == []
    seen = {(c["variant"], c["arch"]) for c in result["compiled"]}
    assert seen == {(variant, arch) for variant in VARIANTS for arch in (80, 90, 100)}


@pytest.mark.slow
def test_the_sweeps_are_seen(report):
    """A report that finds no loop would break no rule. One sweep reads; with a gradient a second
    one writes, and a third writes zeros. The unrolled loop's remainder counts as a loop."""
    for c in report[1]["compiled"]:
        kinds = {s["kind"] for s in c["sweeps"]}
        gradient = VARIANTS[c["variant"]].get("GRAD", True)
        assert kinds == ({"read", "read+write", "write"} if gradient else {"read"})
        for s in c["sweeps"]:
            assert s["ex2_per_element"] == (0 if s["kind"] == "write" else 1)
            assert s["elements"] >= 4 and s["instructions_per_element"] < 25


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoDevice:
    get_current_device = staticmethod(lambda: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(NoDevice())
from drgrpo.kernels import linear_drgrpo as head

kernel = head._drgrpo_row_kernel
run = kernel.run
kernel.run = lambda *args, grid, warmup, **how: run(*args, grid=grid, warmup=True, **how)

def launch(T, V, logits, gradient, skip=0, names=()):
    z = torch.empty(T, -(-V // 16) * 16, dtype=logits)
    inputs = {name: torch.empty(T + skip)[skip:] for name in names}
    per_token = head._PerToken(**inputs) if names else None
    stat = torch.empty(6, T + skip)[:, skip:]
    clipped = torch.empty(T + skip, dtype=torch.int8)[skip:]
    target = torch.empty(T, dtype=torch.int64)
    numbers = torch.ones(1), head._Objective()
    head._rows_triton(z, V, target, per_token, *numbers, stat, clipped, gradient)
    print(len(kernel.device_caches[0][0]), end=" ")

bf16, fp32 = torch.bfloat16, torch.float32
for T, skip in ((128, 0), (1, 0), (7, 3), (100, 1)):
    launch(T, 151936, bf16, bf16, skip, names=("advantage", "old_logprob"))
launch(4, 151936, fp32, bf16, names=("advantage", "old_logprob", "sampler_logprob", "ref_logprob"))
launch(4, 50257, bf16, None, names=("advantage",))
launch(4, 50257, fp32, None)
"""


def test_the_launch_compiles_and_token_counts_do_not_compile_again():
    """Through Triton's own launch path up to the launch: four token counts and misaligned per-token
    tensors are one binary, each of the three other calls is another."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCH]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "1", "1", "2", "3", "4"]


@pytest.mark.slow
def test_predictions_are_within_the_targets(report):
    """Predictions from assumed rates, so a guard against a change of the kernel, not a
    measurement."""
    limits = {"A100": {"7B": 1.10, "1.5B": 1.15}, "H200": {"7B": 1.12, "1.5B": 1.20}}
    for p in report[1]["predictions"]:
        assert 1 < p["best_ratio"] <= limits[p["device"]][p["model"]]
        assert p["best_ms"] < p["worst_ms"]


def test_memory_is_within_the_targets():
    limits = {"7B": (3.6e9, 4.0e9), "1.5B": (2.3e9, 2.5e9)}
    for model, by_tokens in limits.items():
        for T, limit in zip((16_384, 65_536), by_tokens, strict=True):
            memory = cost(T, *SHAPES[model], 4096)
            assert memory["peak_memory"] <= limit
            assert memory["naive_memory"] >= 4 * memory["peak_memory"]


def test_costs_by_hand():
    c = cost(T=8, D=4, V=100, chunk=4)
    assert c["flops"] == 3 * 2 * 8 * 4 * 100
    assert c["logits_bytes_best"] == 8 * 100 * 4 and c["logits_bytes_worst"] == 8 * 100 * 6
    # One read-modify-write, one first write, one cast.
    assert c["dweight_bytes"] == 8 * 400 + 6 * 400
    p = predict(DEVICES[0], 8, 4, 100, 4, (0, 0))
    transfers = 1e3 * (8 * 100 * 4 + 14 * 400 + 4 * 32) / 1.7e12
    assert p["best_ms"] == pytest.approx(p["three_gemms_ms"] + transfers)


def test_bad_binaries_are_noticed():
    sweep = Sweep("read", 16, 13.0, 1.0, 128, 0, 0)
    good = Compiled("on-policy", 90, 50, 0, 0, (sweep,))
    assert good.broken_rules(32) == []
    no_barrier = replace(sweep, kind="read+write")
    bad_sweeps = (
        replace(sweep, load_bits=64),
        replace(sweep, kind="read+write", store_bits=16),
        replace(sweep, ex2_per_element=1.125),
        replace(sweep, barriers=1),
    )
    bad_binaries = [replace(good, sweeps=(bad,)) for bad in bad_sweeps]
    bad_binaries += [replace(good, **bad) for bad in (dict(spill_bytes=8), dict(registers=65))]
    in_place = replace(good, sweeps=(no_barrier,), variant="fp32 logits, bf16 gradient")
    for bad in (*bad_binaries, replace(good, sweeps=()), in_place):
        assert len(bad.broken_rules(32)) == 1


SASS = """
.L_x_1:
        /*0100*/                   LDG.E.EL.128 R4, desc[UR10][R18.64] ;
        /*0110*/                   MUFU.EX2 R39, R36 ;
        /*0120*/              @!P1 LDG.E.EL.64 R4, desc[UR10][R18.64] ;
.L_x_2:
        /*0130*/                   STG.E.U16 desc[UR10][R18.64], R4 ;
        /*0140*/              @!P1 BRA `(.L_x_2) ;
        /*0150*/                   MUFU.EX2 R39, R36 ;
        /*0160*/              @!P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0170*/                   LDG.E R4, desc[UR10][R18.64] ;
        /*0180*/                   MUFU.EX2 R39, R36 ;
        /*0190*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*01a0*/                   LDG.E.128 R4, desc[UR10][R18.64] ;
        /*01b0*/                   MUFU.EX2 R39, R36 ;
        /*01c0*/           @P0 BRA `(.L_x_4) ;
"""


def test_reading_sass():
    """Loops end in a backward branch; an outer loop is not a sweep; a forward branch is no loop."""
    assert [len(loop) for loop in loops(SASS)] == [2, 3]
    store, load = sweeps(SASS, 16, 16)
    assert (store.kind, store.elements, store.store_bits) == ("write", 1, 16)
    assert (load.kind, load.elements, load.load_bits) == ("read", 8, 128)
    assert load.ex2_per_element == 1 / 8
    widths = {"LDG.E": 32, "LDG.E.U16": 16, "LDG.E.EL.U8": 8, "STG.E.64": 64, "LDG.E.ENL2.256": 256}
    assert {op: bits(op) for op in widths} == widths


def test_disassembler_refuses_what_is_no_cubin():
    with pytest.raises(subprocess.CalledProcessError):
        disassemble(b"not a cubin")
