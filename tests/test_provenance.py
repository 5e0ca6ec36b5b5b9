"""A result's origin: other weights, problems or tokenizers show, copies do not."""

import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from conftest import ROOT
from drgrpo.run import provenance
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
    other = fingerprint(str(tmp_path / "copy"))
    assert other not in (changed, fingerprint(random_model))
    config.rename(config.with_stem("generation_configs"))
    assert fingerprint(str(tmp_path / "copy")) != other, "the same bytes under another name"


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
    assert {"triton", "transformers", "vllm", "flash_attn"} < about.keys()
    assert installed("no_such_package") is None
    assert installed("yaml") == version("PyYAML"), "the package has another name"
    if (ROOT / ".git").exists():
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        assert head.stdout.startswith(about["commit"].removesuffix("-dirty"))


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_changed_code_shows_in_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "installed", lambda package: None)  # it takes a second
    (tmp_path / "code.py").write_text("x = 1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init",), ("add", "."), (*who, "commit", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    clean = machine()["commit"]
    (tmp_path / "code.py").write_text("x = 2")
    assert clean and machine()["commit"] == f"{clean}-dirty"
