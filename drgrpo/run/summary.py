"""What a run shows at its start and at its end."""

import torch
import torch.distributed as dist

from drgrpo.config import Config
from drgrpo.evaluation.tables import make_table
from drgrpo.kernels.linear_drgrpo import resolve_backend
from drgrpo.model import Policy, resolve_attention
from drgrpo.run import report
from drgrpo.run.accuracy import HEADINGS, before_and_after
from drgrpo.run.files import read_jsonl
from drgrpo.run.log import Log
from drgrpo.run.memory import Ledger
from drgrpo.run.plot import plot


def start(
    config: Config, policy: Policy, engine: str, ledger: Ledger, device: torch.device, log: Log
) -> None:
    """Print what runs where, and what "auto" stands for here."""
    attention = resolve_attention(config.attention, device, getattr(torch, config.dtype))
    kernel = resolve_backend(config.kernel, device)
    logits = str(policy.objective.logits_dtype).removeprefix("torch.")
    log.say(
        f"{ledger}\nruns on: {dist.get_world_size()} x {device.type}, {config.dtype}; engine "
        f"{engine}, attention {attention}, kernel {kernel} on {logits} logits; torch "
        f"{torch.__version__}; {policy.lm.num_parameters():,} parameters"
    )


def finish(config: Config, log: Log) -> None:
    """Print the table, draw the figures, and name what the run leaves behind. For rank 0."""
    if not log.active:
        return
    title = f"{config.out}: {config.algo}, {config.recipe}, seed {config.seed}"
    cells = before_and_after(read_jsonl(log.out / "eval.jsonl"))
    log.console.print(make_table(title, HEADINGS, cells, left=HEADINGS[:3]))
    figures = ", ".join(f.name for f in plot([config.out]))
    report.refresh(log)
    log.say(
        f"wrote {log.out}/report.html, metrics.jsonl, samples.jsonl, eval.jsonl, {figures} in "
        f"plots/, and {log.out}/hf for transformers, vLLM and eval.py"
    )
