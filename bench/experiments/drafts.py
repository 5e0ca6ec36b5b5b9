"""How many tokens of a response would a draft get right that needs no model?

    python train.py --recipe tiny --steps 52 --save-every 13 --keep 4 --out runs/drafts
    python -m bench.experiments.drafts runs/drafts/checkpoints/step-0000{39,52}/hf --recipe tiny

The first folder is the policy of the previous epoch and the second one today's. Both sample the
same prompts. Today's responses are then replayed as speculative decoding would make them: the
longest match of the last tokens is looked up, and what followed it there is the draft. A drafted
token is right if it is the one that was sampled. Verification accepts it with the same probability.

Result: of the tokens of `tiny` 1.5 % are right from the text itself, and 60 % from the previous
epoch. For `asdiv_smol`, whose two policies were one step apart, it is 1.5 and 38 %.

A call puts one row into bench/results/drafts.json. Its rows come from commit e7e959f, on two cores
of an AMD EPYC.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from bench import harness
from bench.harness import RESULTS, command_line, markdown
from drgrpo import data, distributed
from drgrpo.config import Config, parse_args
from drgrpo.engine import make_engine, stop_token_ids
from drgrpo.model import load_tokenizer
from drgrpo.rollout import Sampler, longest_prompt, tokenize
from drgrpo.run.cli import user_errors
from drgrpo.templates import get_template
from drgrpo.types import Rollout, Sampling

CPU = torch.device("cpu")
TAIL = 16  # sequences: drafts are for small batches
KINDS = {"own": (0, 0), "own, previous epoch": (1, 0), "own, group": (0, 1), "all three": (1, 1)}
"""Where a match is looked up: in prompt and response so far, and whether also in the responses to
the same prompt of the previous epoch, and in the finished ones of today's group."""


class Match(NamedTuple):
    """Tokens of a match, from `shortest` to `longest`, and of a draft."""

    shortest: int = 3
    longest: int = 8
    draft: int = 4


class Text:
    """Tokens, and where each n-gram of them last had a successor."""

    def __init__(self, tokens: list[int], match: Match) -> None:
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.match = match
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            for n in range(self.match.shortest, min(self.match.longest, end) + 1):
                self.after[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def draft(self, others: list["Text"]) -> list[int]:
        """What followed the longest match. Among equal ones the text's own comes first."""
        for n in range(min(self.match.longest, len(self.tokens)), self.match.shortest - 1, -1):
            suffix = tuple(self.tokens[-n:])
            for text in (self, *others):
                if suffix in text.after:
                    return text.tokens[text.after[suffix] :][: self.match.draft]
        return []


def replay(rollout: Rollout, earlier: list[Text], group: list[Text], own: Text) -> Counter[str]:
    """Steps, drafted tokens and right ones until `own` holds the whole response. It starts with the
    prompt and perhaps the first tokens of the response.

    The first token has no draft, because it comes with the prompt. A response of the group is
    finished, and looked up, when it is not longer than this one is by then."""
    response = rollout.completion.token_ids
    at = len(own.tokens) - len(rollout.problem.prompt_ids)
    counts = Counter(tokens=len(response) - at)
    while at < len(response):
        finished = [text for text in group if len(text.tokens) <= at]
        guess = own.draft(earlier + finished) if at else []
        equal = [a == b for a, b in zip(guess, response[at:], strict=False)]
        right = [*equal, False].index(False)
        own.extend(response[at : at + right + 1])
        at += right + 1
        counts.update(steps=1, drafted=len(guess), right=right)
    return counts


def measure(today: list[Rollout], earlier: list[Rollout], group: int, match: Match) -> list[dict]:
    """One row for each kind of draft. Both lists hold `group` responses to each prompt in turn. The
    tail of the batch is what remains to sample when `TAIL` sequences are left."""
    lengths = sorted((r.length for r in today), reverse=True)
    left = lengths[TAIL] if len(lengths) > TAIL else 0
    old, new = ([Text(r.completion.token_ids, match) for r in part] for part in (earlier, today))
    rows = []
    for kind, (with_earlier, with_group) in KINDS.items():
        total: Counter[str] = Counter()
        tail = 0
        for i, rollout in enumerate(today):
            first = i - i % group
            mates = new[first:i] + new[i + 1 : first + group] if with_group else []
            texts = old[first : first + group] if with_earlier else [], mates
            prompt, response = rollout.problem.prompt_ids, rollout.completion.token_ids
            total.update(replay(rollout, *texts, Text(prompt, match)))
            started = Text(prompt + response[:left], match)
            tail = max(tail, replay(rollout, *texts, started)["steps"])
        rows.append({"kind": kind, **total, "tail": lengths[0] - left, "tail_with_drafts": tail})
    return rows


def sample(config: Config, path: str, step: int) -> list[Rollout]:
    """The rollout of a step's prompts from the model at `path`; `step` is part of the seeds."""
    tokenizer = load_tokenizer(path)
    template = get_template(config.template, config.answer, config.system)
    longest = longest_prompt(path, config.max_prompt_tokens, config.max_new_tokens)
    problems, _ = tokenize(data.load_sets(config, print)[0], template, tokenizer, longest)
    prompts = data.step_problems(problems, 1, config.prompts_per_step, config.seed)
    engine = make_engine(config, path, tokenizer, CPU, longest + config.max_new_tokens)
    sampling = Sampling(
        **{name: getattr(config, name) for name in ("max_new_tokens", "temperature")},
        **{"stop": template.stop, "stop_token_ids": stop_token_ids(path, tokenizer)},
    )
    sampler = Sampler(engine, tokenizer, config.seed)
    return sampler.rollout(prompts, config.group_size, sampling, step)[0]


def table(row: dict) -> str:
    heads = [row["name"], "% of tokens right", "% of drafted", "tokens a step", "steps of the tail"]
    lines = []
    for r in row["kinds"]:
        shares = [100 * r["right"] / r["tokens"], 100 * r["right"] / max(r["drafted"], 1)]
        tail = f"{r['tail_with_drafts']} of {r['tail']}"
        lines.append([r["kind"], *shares, f"{r['tokens'] / r['steps']:.2f}", tail])
    return markdown(heads, lines)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("earlier", help="model folder of the previous epoch")
    parser.add_argument("today", help="model folder of today")
    parser.add_argument("--name", default="tiny", help="of the row")
    parser.add_argument("--match", type=int, nargs=2, default=Match()[:2], help="shortest, longest")
    parser.add_argument("--out", type=Path, default=RESULTS / "drafts.json")
    args, flags = parser.parse_known_args()
    config, match = parse_args(flags), Match(*args.match)
    distributed.start()
    earlier, today = sample(config, args.earlier, step=1), sample(config, args.today, step=2)
    distributed.stop()
    settings = ("recipe", "template", "prompts_per_step", "group_size", "max_new_tokens", "dtype")
    row = {"name": args.name, "responses": len(today), "match": match._asdict()}
    row |= {name: getattr(config, name) for name in settings} | {"where": harness.provenance()}
    row["kinds"] = measure(today, earlier, config.group_size, match)
    others = [r for r in harness.read_json(args.out) or [] if r["name"] != args.name]
    print(table(row), harness.write_json(args.out, [*others, row]), sep="\n\n")


if __name__ == "__main__":
    with user_errors():
        main()
