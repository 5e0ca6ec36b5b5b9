"""The run folder and its checkpoints: written whole or not at all, resumed exactly.

    OUT/config.json  metrics.jsonl  samples.jsonl  eval.jsonl
    OUT/checkpoints/step-000050/   state (weights, optimizer), trainer.json, hf/ (for transformers, vLLM and eval.py)
    OUT/checkpoints/latest         -> the newest whole one;  OUT/hf -> its hf/

Rollouts are functions of (seed, step, problem, sample) and the order of the data one of (seed, epoch), so weights, the
optimizer's state and the step number are all there is to resume.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from drgrpo.config import MAY_CHANGE_ON_RESUME, Config, flag
from drgrpo.model import Policy
from drgrpo.types import UserError

RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")


def claim(config: Config) -> Path | None:
    """Check on every process that the run folder is empty or belongs to this config. Returns the newest whole checkpoint
    to resume from, if there is one. Changes nothing on disk."""
    out = Path(config.out)
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / "config.json").is_file():
        raise UserError(f"--out {out} is not empty and holds no run (no config.json); choose another folder")
    theirs, ours = json.loads((out / "config.json").read_text()), asdict(config)
    changed = [k for k in ours if k not in MAY_CHANGE_ON_RESUME and theirs.get(k) != ours[k]]
    if changed:
        shown = ", ".join(f"{k}={theirs.get(k)!r} there, {ours[k]!r} now" for k in changed)
        names = [str(ours[k]).strip("/").replace("/", "-") for k in changed if k in ("recipe", "algo", "engine")]
        names += [f"{flag(k)}{ours[k]}" for k in changed if isinstance(ours[k], int | float)]
        raise UserError(
            f"--out {out} holds a run of another config ({shown}); give this one its own folder, "
            f"such as --out {out}-{'-'.join(names) or '2'}"
        )
    latest = out / "checkpoints" / "latest"
    return latest.resolve() if latest.exists() else None


def open_run(config: Config, resumed_step: int) -> None:
    """Rank 0: make the folder, write the config, and cut the records back to the step that is resumed from."""
    out = Path(config.out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    for name in RECORDS:
        lines = (out / name).read_text().splitlines(keepends=True) if (out / name).exists() else []
        # a line torn by a kill has no newline; step 0 is the evaluation before training, made anew without a checkpoint
        kept = [l for l in lines if l.endswith("\n") and resumed_step and json.loads(l)["step"] <= resumed_step]
        write_atomically(out / name, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def save(config: Config, step: int, policy: Policy, optimizer: torch.optim.Optimizer, tokenizer, dtype: torch.dtype,
         hours_used: float) -> Path:  # fmt: skip
    """A checkpoint after `step`: everything under a temporary name, then renamed, then pointed at. Collective."""
    folder = Path(config.out) / "checkpoints"
    final, partial = folder / f"step-{step:06d}", folder / f"step-{step:06d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    weights, optimizer_state = get_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "optimizer": optimizer_state}, checkpoint_id=partial / "state")
    save_hf(partial / "hf", policy, tokenizer, dtype)
    if dist.get_rank() == 0:
        (partial / "trainer.json").write_text(json.dumps({"step": step, "hours_used": hours_used}) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        point(folder / "latest", final.name)
        point(Path(config.out) / "hf", "checkpoints/latest/hf")
        for old in sorted(folder.glob("step-[0-9][0-9][0-9][0-9][0-9][0-9]"))[: -config.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def save_hf(path: Path, policy: Policy, tokenizer, dtype: torch.dtype) -> None:
    """The policy in `dtype` as a Hugging Face folder. Collective; rank 0 writes."""
    weights = {}
    for name, tensor in policy.named_weights(dtype):
        if dist.get_rank() == 0:
            weights[name] = tensor.cpu()
    if dist.get_rank() == 0:
        if policy.lm.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # one storage again: saved once
        policy.lm.save_pretrained(path, state_dict=weights)
        described = json.loads((path / "config.json").read_text())
        described["dtype"] = str(dtype).removeprefix("torch.")  # it was written for the float32 master weights
        (path / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        tokenizer.save_pretrained(path)


def point(link: Path, target: str) -> None:
    """Make or move a symbolic link in one step."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Fill policy and optimizer from a checkpoint made by any number of processes; returns {step, hours_used}."""
    weights, optimizer_state = get_state_dict(policy, optimizer)
    state = {"weights": weights, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path / "state")
    set_state_dict(policy, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"])
    return json.loads((path / "trainer.json").read_text())
