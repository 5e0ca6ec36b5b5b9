"""What a run shows at its start and at its end."""

from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from drgrpo.config import Config
from drgrpo.kernels.linear_drgrpo import resolve_backend
from drgrpo.model import Policy, resolve_attention
from drgrpo.run.files import read_jsonl
from drgrpo.run.log import Log, number
from drgrpo.run.memory import Ledger
from drgrpo.run.plot import plot


def start(
    config: Config, policy: Policy, engine: str, ledger: Ledger, device: torch.device, log: Log
) -> None:
    """Print what runs where, and what "auto" stands for here."""
    attention = resolve_attention(config.attention, device, getattr(torch, config.dtype))
    kernel = resolve_backend(config.kernel, device)
    log.say(
        f"{ledger}\nruns on: {dist.get_world_size()} x {device.type}, {config.dtype}; engine "
        f"{engine}, attention {attention}, kernel {kernel}; torch {torch.__version__}; "
        f"{policy.lm.num_parameters():,} parameters"
    )


def finish(config: Config, log: Log) -> None:
    """Print the table, draw the figures, and name what the run leaves behind. For rank 0."""
    if not log.active:
        return
    title = f"{config.out}: {config.algo}, {config.recipe}, seed {config.seed}"
    log.console.print(before_and_after(read_jsonl(log.out / "eval.jsonl"), title))
    figures = ", ".join(f.name for f in plot([config.out]))
    log.say(
        f"wrote {log.out}/metrics.jsonl, samples.jsonl, eval.jsonl, {figures} in plots/, and "
        f"{log.out}/hf for transformers, vLLM and eval.py"
    )


def before_and_after(rows: list[dict[str, Any]], title: str) -> Table:
    """The first and the last evaluation of every benchmark, side by side."""
    table = Table(title=title, title_justify="left")
    for column in ("benchmark", "sampling", "when"):
        table.add_column(column)
    for column in ("accuracy", "len right", "len wrong", "cut"):
        table.add_column(column, justify="right")
    evaluations: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["benchmark"], row["temperature"], row["samples"])
        evaluations.setdefault(key, []).append(row)
    for (benchmark, temperature, samples), history in evaluations.items():
        how = "greedy" if temperature == 0 else f"T={temperature:g}, {samples} each"
        for when, row in (("before", history[0]), (f"step {history[-1]['step']}", history[-1])):
            accuracy, cut = f"{row['accuracy']:.3f}", number(row["truncated_frac"], ".1%")
            lengths = number(row["len_correct"]), number(row["len_incorrect"])
            table.add_row(benchmark, how, when, accuracy, *lengths, cut)
    return table
