"""A result's origin: other weights, problems or tokenizers show, copies do not."""

import shutil
import subprocess
import sys

import torch

from conftest import ROOT
from drgrpo.run.provenance import fingerprint, installed, machine, problems_digest, versions
from drgrpo.types import Problem


def test_a_copy_has_the_same_weights_and_a_changed_byte_does_not(random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy")) == fingerprint(random_model)
    (tmp_path / "copy" / "eval").mkdir()
    (tmp_path / "copy" / "README.md").write_text("a note")
    assert fingerprint(str(tmp_path / "copy")) == fingerprint(random_model)
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = fingerprint(str(tmp_path / "copy"))
    assert changed != fingerprint(random_model)
    config = tmp_path / "copy" / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert fingerprint(str(tmp_path / "copy")) not in (changed, fingerprint(random_model))


def test_problems_are_told_apart_by_question_answer_and_id():
    problems = [Problem(0, "q", "1"), Problem(1, "r", ["2"])]
    others = [
        problems[:1],
        [problems[0], Problem(1, "r", "2")],
        [problems[0], Problem(2, "r", ["2"])],
        problems[::-1],
    ]
    digests = [problems_digest(p) for p in (problems, *others)]
    assert len(set(digests)) == 5 and problems_digest(list(problems)) == digests[0]


def test_versions_of_what_grades_and_of_what_samples():
    assert {"math_verify", "sympy", "latex2sympy2_extended"} < versions().keys()
    assert "torch" not in versions()
    assert {"torch", "transformers"} <= versions("torch").keys()
    assert "vllm" not in versions("torch") and "vllm" in versions("vllm")


def test_a_start_is_described_by_commit_command_and_versions():
    about = machine()
    assert about["torch"] == torch.__version__ and about["gpu"] is None
    assert about["argv"] == sys.argv and "threads" in about["cpu"]
    assert installed("no_such_package") is None
    if (ROOT / ".git").exists():
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        assert head.stdout.startswith(about["commit"].removesuffix("-dirty"))
