"""The scores that the paper prints (arXiv 2503.20783, Tables 1 and 4). They are greedy, with 3000
new tokens unless the name says 8k.

Two slips of the paper are mended here. Qwen2.5-Math-7B without a template is printed with 0.2 on
AIME24. 0.2 % is no multiple of 1/30, and the printed average of 38.2 needs 20.0. The AMC scores of
the 4-shot rows are n/40: they come from the 40 problems of AMC23, and not from the 83 of the other
rows. These scores and their averages are no match for a score on the 83.
"""

from dataclasses import dataclass
from statistics import fmean

from drgrpo.data import BENCHMARKS

N = dict(zip(BENCHMARKS, (30, 83, 500, 272, 675), strict=True))
"""Problems of each benchmark as the paper counts them."""

PROTOCOL = {"temperature": 0.0, "samples": 1, "max_new_tokens": 3000, "grader": "paper"}


@dataclass(frozen=True)
class Published:
    """One row: accuracies in per cent, in the order of BENCHMARKS.

    hub, template: set where one of our templates reproduces the prompt, so that the row can be
    matched to a model. amc_n: the problems behind the AMC score."""

    name: str
    table: int
    scores: tuple[float, float, float, float, float]
    hub: str = ""
    template: str = ""
    amc_n: int = 83

    @property
    def average(self) -> float:
        return fmean(self.scores)

    def n(self, benchmark: str) -> int:
        return self.amc_n if benchmark == "amc" else N[benchmark]

    def score(self, benchmark: str) -> float:
        return self.scores[BENCHMARKS.index(benchmark)]


Q15, Q7 = "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B"
OAT15, OAT7 = "sail/Qwen2.5-Math-1.5B-Oat-Zero", "sail/Qwen2.5-Math-7B-Oat-Zero"
NUMINA, OAT3 = "lkevinzc/Llama-3.2-3B-NuminaQA", "sail/Llama-3.2-3B-Oat-Zero"
SIMPLE_RL = "hkust-nlp/Qwen-2.5-Math-7B-SimpleRL-Zero"

PUBLISHED = (
    Published("Qwen2.5-Math-1.5B, 4-shot", 1, (0.0, 20.0, 50.4, 12.1, 15.9), amc_n=40),
    Published("Qwen2.5-Math-1.5B, r1", 1, (0.0, 9.6, 21.2, 6.6, 2.2), Q15, "r1"),
    Published("Qwen2.5-Math-1.5B, qwen_math", 1, (20.0, 32.5, 33.0, 12.5, 22.8), Q15, "qwen_math"),
    Published("Qwen2.5-Math-1.5B, none", 1, (16.7, 43.4, 61.8, 15.1, 28.4), Q15, "none"),
    Published("Qwen2.5-Math-7B, 4-shot", 1, (3.3, 22.5, 61.6, 10.7, 20.9), amc_n=40),
    Published("Qwen2.5-Math-7B, r1", 1, (0.0, 0.0, 0.0, 0.0, 0.1), Q7, "r1"),
    Published("Qwen2.5-Math-7B, qwen_math", 1, (16.7, 38.6, 50.6, 9.9, 16.6), Q7, "qwen_math"),
    Published("Qwen2.5-Math-7B, none", 1, (20.0, 45.8, 69.0, 21.3, 34.7), Q7, "none"),
    Published("Oat-Zero-1.5B", 4, (20.0, 53.0, 74.2, 25.7, 37.6), OAT15, "qwen_math"),
    Published("R1-Distill-Qwen-1.5B", 4, (2.5, 21.7, 52.2, 16.3, 17.3)),
    Published("R1-Distill-Qwen-1.5B, 8k", 4, (20.0, 49.4, 77.4, 25.0, 35.8)),
    Published("Qwen2.5-Math-1.5B-Instruct", 4, (10.0, 48.2, 74.2, 26.5, 40.2)),
    Published("Llama-3.2-3B", 4, (0.0, 2.4, 6.4, 6.3, 1.3)),
    Published("Llama-3.2-3B + Dr. GRPO", 4, (3.3, 7.2, 10.0, 11.0, 2.2)),
    Published("Llama-3.2-3B-FineMath", 4, (0.0, 3.6, 18.4, 5.9, 2.2)),
    Published("Llama-3.2-3B-FineMath + Dr. GRPO", 4, (3.3, 10.8, 38.0, 12.9, 9.0)),
    Published("Llama-3.2-3B-NuminaQA", 4, (0.0, 0.0, 0.6, 0.0, 0.1), NUMINA, "r1"),
    Published("Oat-Zero-3B", 4, (6.7, 18.1, 50.0, 14.3, 14.7), OAT3, "r1"),
    Published("Llama-3.2-3B-Instruct", 4, (6.7, 15.7, 38.8, 11.8, 12.6)),
    Published("SimpleRL-Zero-7B", 4, (26.7, 60.2, 78.2, 27.6, 40.3), SIMPLE_RL, "qwen_math"),
    Published("PRIME-Zero-7B", 4, (16.7, 62.7, 83.8, 36.0, 40.9)),
    Published("OpenReasoner-Zero-7B", 4, (13.3, 47.0, 79.2, 31.6, 44.0)),
    Published("OpenReasoner-Zero-7B, 8k", 4, (13.3, 54.2, 82.4, 31.6, 47.9)),
    Published("Oat-Zero-7B", 4, (43.3, 62.7, 80.0, 30.1, 41.0), OAT7, "qwen_math"),
    Published("R1-Distill-Qwen-7B", 4, (10.0, 26.2, 60.1, 23.0, 23.1)),
    Published("R1-Distill-Qwen-7B, 8k", 4, (33.3, 68.4, 88.1, 35.9, 47.7)),
    Published("Qwen2.5-Math-7B-Instruct", 4, (16.7, 53.0, 83.6, 29.8, 42.7)),
)


def same_model(row: Published, model: str, template: str) -> bool:
    """Whether a published row is about this model (a hub name, or a folder of that name) under this
    template."""
    name = model.rstrip("/").split("/")[-1]
    return bool(row.hub) and row.hub.split("/")[1] == name and row.template == template
