"""An evaluation on its way: what is to be answered, and what is written as answers arrive."""

import time
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from drgrpo import distributed
from drgrpo.engine import stop_token_ids
from drgrpo.evaluation import responses
from drgrpo.evaluation.config import MAY_CHANGE_ON_RESUME, Command, EvalConfig
from drgrpo.evaluation.evaluate import answer, counters, make_graders
from drgrpo.rollout import Sampler, check_budget, tokenize
from drgrpo.run import provenance
from drgrpo.run.files import append_jsonl, write_json
from drgrpo.run.log import Log
from drgrpo.templates import TEMPLATES, Template
from drgrpo.types import Problem, Sampling


class Part(NamedTuple):
    """A benchmark under one template and temperature. A problem whose prompt is too long for the
    model has no `prompt_ids`."""

    template: Template
    temperature: float
    benchmark: str
    problems: list[Problem]


def make_parts(
    config: EvalConfig,
    sets: dict[str, list[Problem]],
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
) -> list[Part]:
    """Every benchmark under every template and temperature, tokenized. UserError if no prompt fits
    beside a response."""
    check_budget(config.max_new_tokens, positions)
    parts = []
    for template in config.load_templates():
        prompts = {}
        for name, problems in sets.items():
            fitting = {p.id: p for p in tokenize(problems, template, tokenizer, positions - 1)[0]}
            prompts[name] = [fitting.get(p.id, p) for p in problems]
        for temperature, name in product(config.all_temperatures, sets):
            parts.append(Part(template, temperature, name, prompts[name]))
    return parts


class Record:
    """The files of a running evaluation, which rank 0 writes: `responses.jsonl`, and `eval.json`
    with the settings, counters and seconds so far.

    A record begins with what an interrupted call left. `resolved` are the settings that `auto`
    stands for. UserError if the folder holds responses to other settings."""

    def __init__(self, log: Log, command: Command, resolved: dict, device: torch.device) -> None:
        settings = asdict(command.config) | resolved
        settings["weights"] = provenance.fingerprint(command.config.model)
        own = [t for t in command.config.load_templates() if t.name not in TEMPLATES]
        settings["prompts"] = {template.name: template.text for template in own}
        settings["data"] = {name: provenance.problems_digest(p) for name, p in command.sets.items()}
        self.log = log
        self.report: dict[str, Any] = {
            "settings": settings,
            "versions": provenance.versions(resolved["engine"]),
            "notices": command.notices,
            "device": f"{dist.get_world_size()} x {provenance.device_name(device)}",
        }
        self.rows, saved = responses.resume_rows(log.out, self.report, MAY_CHANGE_ON_RESUME)
        self.saved_counters = saved.get("counters", {})
        self.saved_seconds = saved.get("seconds", 0.0)
        self.report |= {"counters": dict(self.saved_counters), "seconds": self.saved_seconds}
        write_json(log.out / "eval.json", self.report)

    def add(self, rows: list[dict], counts: list[dict[str, int]], seconds: float) -> None:
        """Append rows. `counts` are the counters of all processes and `seconds` is the time, both
        since this call of `eval.py` began to sample."""
        self.rows += rows
        append_jsonl(self.log.out / "responses.jsonl", rows)
        old = self.saved_counters
        for name in counts[0]:
            self.report["counters"][name] = old.get(name, 0) + sum(c[name] for c in counts)
        self.report["seconds"] = self.saved_seconds + seconds
        write_json(self.log.out / "eval.json", self.report)


def unanswered(parts: list[Part], record: Record | None, log: Log) -> list[Part]:
    """What rank 0's record does not hold yet, on every process."""
    keys = [responses.key(row) for row in record.rows] if record else []
    answered = set(distributed.gather_lists(keys)[0])
    todo, count = [], 0
    for part in parts:
        where = (part.template.name, part.temperature, part.benchmark)
        problems = [p for p in part.problems if (*where, p.id) not in answered]
        if problems:
            todo.append(part._replace(problems=problems))
            count += len(problems)
    if answered:
        log.say(f"{log.out}: {len(answered)} problems are answered, {count} are left")
    return todo


def answer_parts(
    config: EvalConfig, parts: list[Part], sampler: Sampler, log: Log, record: Record | None
) -> None:
    """Answer every problem, a chunk of a benchmark at a time. `record` is None except on rank 0."""
    started = time.perf_counter()
    chunk = max(1, config.write_every * dist.get_world_size() // config.tp // config.samples)
    ends = stop_token_ids(config.model, sampler.tokenizer)
    rules = {part.template.answer for part in parts}
    with make_graders(rules, config.grader, config.reward) as graders:
        for part in parts:
            template = part.template
            tag: dict[str, Any] = {"benchmark": part.benchmark, "template": template.name}
            tag["temperature"] = part.temperature
            sampling = Sampling(
                max_new_tokens=config.max_new_tokens,
                temperature=part.temperature,
                stop=template.stop,
                stop_token_ids=ends,
            )
            for start in range(0, len(part.problems), chunk):
                problems = part.problems[start : start + chunk]
                grader = graders[template.answer]
                rows = answer(sampler, grader, problems, config.samples, sampling)
                counts = distributed.gather([counters(graders)], config.tp)
                if record:
                    seconds = time.perf_counter() - started
                    record.add([tag | row for row in rows], counts, seconds)
            log.say(
                f"{part.benchmark}, {template.name}, T={part.temperature:g}: "
                f"{len(part.problems)} problems answered"
            )
