"""The folder of a run.

    OUT/config.json     every setting
    OUT/run.json        each start: commit, command line, machine, versions
    OUT/metrics.jsonl   one line a step
    OUT/samples.jsonl   prompts and responses
    OUT/eval.jsonl      one line an evaluation of a benchmark
    OUT/report.html     all of that in one page
    OUT/plots/          figures
    OUT/checkpoints/    see checkpoint.py
    OUT/hf              the newest weights, for transformers, vLLM and eval.py

This file imports no torch, so that a wrong `--out` is reported at once.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from drgrpo.config import MAY_CHANGE_ON_RESUME, RECIPES, Config
from drgrpo.run.cli import flag
from drgrpo.run.files import read_object, write_atomically, write_json
from drgrpo.types import UserError, check_path

RECORDS = ("metrics.jsonl", "samples.jsonl", "eval.jsonl")


def check(config: Config) -> None:
    """UserError unless the folder is empty or holds a run of this config. Writes nothing."""
    out = config.folder
    check_writable(out)
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held <= {"config.json.partial"}:  # a run was killed before it had a config
        return
    if not (out / "config.json").is_file():
        raise UserError(f"--out {out} is not empty and holds no run; choose another folder")
    defaults = {field.name: field.default for field in fields(Config)}
    # A field that did not exist when the run began had no effect, as its default has none.
    saved = defaults | read_object(out / "config.json")
    current = asdict(config)
    changed = [
        name
        for name, value in current.items()
        if name not in MAY_CHANGE_ON_RESUME and saved[name] != value
    ]
    if changed:
        shown = ", ".join(f"{k}={saved[k]!r} there, {current[k]!r} now" for k in changed)
        raise UserError(
            f"--out {out} holds a run of another config ({shown}); give this run its own folder, "
            f"such as --out {out}-{suffix(current, changed)}"
        )
    if config.resume == "never" and list_checkpoints(out):
        raise UserError(
            f"--out {out} holds checkpoints and --resume is never; choose another --out"
        )


def changed_settings(settings: dict) -> dict:
    """The fields of a saved config that differ from its recipe's. All of them if the recipe is
    unknown. `recipe` and `out` do not count."""
    recipe = asdict(RECIPES[settings["recipe"]]()) if settings["recipe"] in RECIPES else {}
    return {
        name: value
        for name, value in settings.items()
        if name not in ("recipe", "out") and (name not in recipe or recipe[name] != value)
    }


def check_writable(out: Path) -> None:
    """UserError unless files can be written into `out`, which may not exist yet."""
    check_path("--out", out)
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--out {out}: {existing} is no folder to write to; choose another --out")


def suffix(settings: dict, changed: list[str]) -> str:
    """A folder name that tells this run from the one that it differs from."""
    names = [settings[k].strip("/") for k in changed if k in ("recipe", "algo", "engine")]
    names += [f"{flag(k)}{settings[k]}" for k in changed if isinstance(settings[k], int | float)]
    return "-".join(names) or "2"


def list_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(out.glob(f"checkpoints/step-{'[0-9]' * 6}"), reverse=True)


def open_run(config: Config, resumed_step: int, machine: dict) -> None:
    """Make the folder, write config.json, add this start to run.json, and cut the records back to
    the step that the run resumes from. For rank 0."""
    out = config.folder
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", asdict(config))  # first, because it makes the folder a run's
    (out / "checkpoints").mkdir(exist_ok=True)
    starts = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else []
    write_json(out / "run.json", [*starts, {"resumed_step": resumed_step, **machine}])
    for name in RECORDS:
        cut_back(out / name, resumed_step)


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of a record up to `step`. Step 0 keeps none: without a checkpoint, the
    evaluation before training is made again. A line that a kill tore off has no newline."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    complete = [line for line in lines if line.endswith("\n") and step]
    write_atomically(path, "".join(line for line in complete if json.loads(line)["step"] <= step))
