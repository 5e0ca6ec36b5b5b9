"""The README.md of a trained model: what it is, what it scores, and how to make it again."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from drgrpo.config import Config
from drgrpo.data import HUB, Share
from drgrpo.run.accuracy import HEADINGS, before_and_after, sampling
from drgrpo.run.files import read_jsonl
from drgrpo.run.folder import changed_settings
from drgrpo.smol import HUB_NAME as SMOL

MADE = {
    "tiny": "the warmed-up model of the tiny recipe",
    "smol": f"{SMOL} with a supervised phase on formulas",
}
"""What the models are that the trainer makes itself."""


def write(config: Config, step: int, folder: Path, library: str) -> None:
    """Write README.md into `folder`, which holds a model for `library`. The scores are those in
    eval.jsonl, and the command is that of the newest start in run.json."""
    out, evals = config.folder, read_jsonl(config.folder / "eval.jsonl")
    start = json.loads((out / "run.json").read_text())[-1]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = cell
    text = environment.get_template("model_card.md.jinja").render(
        card_data=metadata(config, step, library, evals).to_yaml(),
        name=out.resolve().name,
        base=MADE.get(config.model, config.model),
        step=step,
        library=library,
        config=config,
        changed=changed_settings(asdict(config)),
        headings=HEADINGS,
        scores=before_and_after(evals),
        processes=dist.get_world_size(),
        command=shlex.join(["python", *start.get("argv", [])]),
        start=start,
    )
    ModelCard(text).save(folder / "README.md")


def metadata(config: Config, step: int, library: str, evals: list[dict[str, Any]]) -> ModelCardData:
    """What the hub reads."""
    base = SMOL if config.model == "smol" else config.model
    newest = [row for row in evals if row["step"] == evals[-1]["step"]]
    return ModelCardData(
        base_model=base if is_hub_name(base) else None,
        datasets=dataset(config.train_data),
        library_name=library,
        pipeline_tag="text-generation",
        tags=["dr-grpo", "grpo", "reinforcement-learning"],
        model_name=config.folder.resolve().name,
        eval_results=[result(row) for row in newest],
    )


def result(row: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset(row["benchmark"]) or row["benchmark"],
        dataset_name=row["benchmark"],
        metric_type="accuracy",
        metric_name=f"accuracy, {sampling(row)}",
        metric_value=round(row["accuracy"], 4),
    )


def dataset(source: str) -> str | None:
    """The hub's name of a source of problems, or None for one that is not on the hub."""
    name = Share.of(source).name
    if name in HUB:
        return HUB[name].repo
    name = name.partition(":")[0]
    return name if is_hub_name(name) else None


def is_hub_name(name: str) -> bool:
    """Whether a name has the form OWNER/NAME and is no path of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", r"\|").replace("<", "&lt;")
