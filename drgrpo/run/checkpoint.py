"""The run folder and its checkpoints: written whole or not at all, resumed exactly.

    OUT/config.json  metrics.jsonl  samples.jsonl  eval.jsonl
    OUT/checkpoints/step-000050/   state/ (weights, optimizer), rng/, hf/ (for transformers, vLLM and eval.py),
                                   trainer.json (step, hours, config, versions), manifest.json
                                   (checksum of every file)
    OUT/checkpoints/latest         -> the newest whole one;  OUT/hf -> its hf/

Rollouts are functions of (seed, step, problem, sample) and the order of the data one of (seed,
epoch), so weights, the optimizer's state and the step number are all that the trainer needs to
resume; the generators' states are kept for what a fork may add.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from drgrpo.config import MAY_CHANGE_ON_RESUME, Config, flag
from drgrpo.distributed import gather_lists, share
from drgrpo.model import Policy
from drgrpo.types import UserError

RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")


def claim(config: Config) -> None:
    """UserError unless the run folder is empty or belongs to this config. Changes nothing on
    disk."""
    out = Path(config.out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "config.json").is_file():
        raise UserError(
            f"--out {out} is not empty and holds no run (no config.json); choose another folder"
        )
    theirs, ours = json.loads((out / "config.json").read_text()), asdict(config)
    changed = [k for k in ours if k not in MAY_CHANGE_ON_RESUME and theirs.get(k) != ours[k]]
    if changed:
        shown = ", ".join(f"{k}={theirs.get(k)!r} there, {ours[k]!r} now" for k in changed)
        names = [
            str(ours[k]).strip("/").replace("/", "-")
            for k in changed
            if k in ("recipe", "algo", "engine")
        ]
        names += [f"{flag(k)}{ours[k]}" for k in changed if isinstance(ours[k], int | float)]
        raise UserError(
            f"--out {out} holds a run of another config ({shown}); give this one its own folder, "
            f"such as --out {out}-{'-'.join(names) or '2'}"
        )
    if config.resume == "never" and found(config):
        raise UserError(
            f"--out {out} holds checkpoints and --resume never forbids to go on; choose another folder"
        )


def found(config: Config) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(
        Path(config.out).glob("checkpoints/step-[0-9][0-9][0-9][0-9][0-9][0-9]"), reverse=True
    )


def newest_whole(config: Config, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose every file has its checksum. Says so loudly if a newer one is
    damaged. Collective."""
    for path in found(config):
        damaged = damaged_files(path)
        if not damaged:
            return path
        say(
            f"WARNING: {path} is damaged ({', '.join(damaged)}): going back to the checkpoint before it"
        )
    return None


def damaged_files(path: Path) -> list[str]:
    """Files of a checkpoint that are missing or changed since they were written. Every process
    reads its share."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return ["manifest.json"]
    damaged = [name for name in share(sorted(manifest)) if checksum(path / name) != manifest[name]]
    return sorted(name for part in gather_lists(damaged) for name in part)


def checksum(path: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_run(config: Config, resumed_step: int) -> None:
    """Rank 0: make the folder, write the config, and cut the records back to the step that is
    resumed from."""
    out = Path(config.out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    for name in RECORDS:
        lines = (out / name).read_text().splitlines(keepends=True) if (out / name).exists() else []
        # a line torn by a kill has no newline; step 0 is the evaluation before training, made anew
        # without a checkpoint
        kept = [
            l
            for l in lines
            if l.endswith("\n") and resumed_step and json.loads(l)["step"] <= resumed_step
        ]
        write_atomically(out / name, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write(
    config: Config,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    tokenizer,
    dtype: torch.dtype,
    hours_used: float,
    versions: dict[str, str],
) -> None:
    """Everything of a checkpoint after `step`, under a temporary name. Collective. Between this and
    `commit` the caller writes the step's records: a run killed at any moment then has both or
    neither."""
    partial = temporary(config, step)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "rng").mkdir(parents=True)
    dist.barrier()
    weights, optimizer_state = get_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "optimizer": optimizer_state}, checkpoint_id=partial / "state")
    torch.save(generator_states(), partial / "rng" / f"rank-{dist.get_rank():05d}.pt")
    save_hf(partial / "hf", policy, tokenizer, dtype)
    if dist.get_rank() == 0:
        trainer = {
            "step": step,
            "hours_used": hours_used,
            "processes": dist.get_world_size(),
            "config": asdict(config),
            "versions": versions,
        }
        (partial / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n")
    dist.barrier()
    names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
    sums = [
        pair
        for part in gather_lists([(name, checksum(partial / name)) for name in share(names)])
        for pair in part
    ]
    if dist.get_rank() == 0:
        (partial / "manifest.json").write_text(json.dumps(dict(sorted(sums)), indent=1) + "\n")


def commit(config: Config, step: int) -> None:
    """Rank 0: give the checkpoint of `step` its name, which makes it count, point at it, and delete
    the oldest."""
    final = temporary(config, step).with_suffix("")
    shutil.rmtree(final, ignore_errors=True)  # damaged, or this run would not be here again
    temporary(config, step).rename(final)
    point(final.parent / "latest", final.name)
    point(Path(config.out) / "hf", "checkpoints/latest/hf")
    for old in found(config)[config.keep :]:
        shutil.rmtree(old)


def temporary(config: Config, step: int) -> Path:
    return Path(config.out) / "checkpoints" / f"step-{step:06d}.partial"


def generator_states() -> dict:
    """Of every random generator of this process."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_generators(path: Path) -> None:
    """This rank's, if the checkpoint was made by as many processes or more; nothing in the trainer
    depends on it."""
    file = path / "rng" / f"rank-{dist.get_rank():05d}.pt"
    if file.exists():
        states = torch.load(file, weights_only=False)  # our own file, its checksum just compared
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])


def save_hf(path: Path, policy: Policy, tokenizer, dtype: torch.dtype) -> None:
    """The policy in `dtype` as a Hugging Face folder. Collective; rank 0 writes."""
    weights = {}
    for name, tensor in policy.named_weights(dtype):
        if dist.get_rank() == 0:
            weights[name] = tensor.cpu()
    if dist.get_rank() == 0:
        if policy.lm.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights[
                "model.embed_tokens.weight"
            ]  # one storage again: saved once
        policy.lm.save_pretrained(path, state_dict=weights)
        described = json.loads((path / "config.json").read_text())
        described["dtype"] = str(dtype).removeprefix(
            "torch."
        )  # it was written for the float32 master weights
        (path / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        tokenizer.save_pretrained(path)


def point(link: Path, target: str) -> None:
    """Make or move a symbolic link in one step."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Fill policy and optimizer from a checkpoint made by any number of processes; returns
    trainer.json."""
    weights, optimizer_state = get_state_dict(policy, optimizer)
    state = {"weights": weights, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path / "state")
    set_state_dict(
        policy, optimizer, model_state_dict=state["weights"], optim_state_dict=state["optimizer"]
    )
    restore_generators(path)
    return json.loads((path / "trainer.json").read_text())
