"""The scores that the paper prints (arXiv 2503.20783, Tables 1 and 4), and what others measured on
the models that it released. The paper's are greedy, with 3000 new tokens unless the name says 8k.

Two slips of the paper are mended here. Qwen2.5-Math-7B without a template is printed with 0.2 on
AIME24. 0.2 % is no multiple of 1/30, and the printed average of 38.2 needs 20.0. The AMC scores of
the 4-shot rows are n/40: they come from the 40 problems of AMC23, and not from the 83 of the other
rows. These scores and their averages are no match for a score on the 83.
"""

from dataclasses import dataclass, field

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

    def n(self, benchmark: str) -> int:
        return self.amc_n if benchmark == "amc" else N[benchmark]

    @property
    def by_benchmark(self) -> dict[str, float]:
        return dict(zip(BENCHMARKS, self.scores, strict=True))


@dataclass(frozen=True)
class Reevaluation:
    """What others measured on a released model: accuracies in per cent by benchmark.

    sd: their standard deviation over seeds, where the source has one. protocol: how they sampled.
    hub: the model. amc_n: the problems behind the AMC score."""

    name: str
    source: str
    protocol: str
    by_benchmark: dict[str, float]
    hub: str
    sd: dict[str, float] = field(default_factory=dict)
    amc_n: int = 83
    template: str = ""

    def n(self, benchmark: str) -> int:
        return self.amc_n if benchmark == "amc" else (N | {"aime25": 30})[benchmark]


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


SOBER_SETS = ("aime24", "aime25", "amc", "math500", "minerva", "olympiad_bench")


def sober_look(
    name: str, hub: str, scores: tuple[float, ...], sd: tuple[float, ...]
) -> Reevaluation:
    """A row of Table 3 of "A Sober Look at Progress in Language Model Reasoning"."""
    return Reevaluation(
        name=f"{name}, Sober Look",
        source="arXiv 2504.07086v2, Table 3",
        protocol="mean of 10 seeds (3 on MATH500, Minerva and OlympiadBench), at most 4096 new "
        "tokens, temperature and top_p tuned for each model, LightEval 0.8.1 on vLLM, one A100",
        by_benchmark=dict(zip(SOBER_SETS, scores, strict=True)),
        hub=hub,
        sd=dict(zip(SOBER_SETS, sd, strict=True)),
        amc_n=40,
    )


ISSUE_35 = "github.com/sail-sg/understand-r1-zero issue 35 (September 2025)"

REEVALUATED = (
    sober_look(
        "Oat-Zero-7B", OAT7, (28.0, 8.8, 66.2, 79.4, 34.4, 43.8), (3.1, 2.5, 3.6, 0.3, 1.4, 1.1)
    ),
    sober_look(
        "Qwen2.5-Math-7B", Q7, (20.7, 8.7, 56.2, 64.3, 17.3, 29.0), (3.8, 3.9, 5.7, 0.5, 1.9, 0.5)
    ),
    sober_look(
        "Oat-Zero-1.5B", OAT15, (16.0, 6.7, 52.5, 73.5, 26.3, 37.2), (3.2, 3.4, 2.9, 1.7, 0.8, 1.3)
    ),
    sober_look(
        "Qwen2.5-Math-1.5B",
        Q15,
        (11.3, 5.7, 44.0, 51.7, 11.3, 26.0),
        (3.6, 2.7, 4.9, 5.5, 2.2, 0.6),
    ),
    Reevaluation(
        "Oat-Zero-7B, GPG",
        "arXiv 2504.02546, the table of 7B models",
        "one answer each, with the released code",
        dict(zip(BENCHMARKS, (30.0, 55.4, 80.6, 29.0, 44.0), strict=True)),
        OAT7,
    ),
    Reevaluation(
        "Oat-Zero-7B, mean@32",
        ISSUE_35,
        "a user's mean of 32 samples at temperature 1 and top_p 1, vLLM 0.9.0 (pass@32 is 56.7, "
        "maj@32 is 26.7)",
        {"aime24": 25.7},
        OAT7,
    ),
    Reevaluation(
        "Oat-Zero-7B, greedy",
        ISSUE_35,
        "a user's greedy runs, 26.7 at first and 30.0 with the released script, vLLM 0.9.0; the "
        "authors trained with vLLM 0.7.2",
        {"aime24": 30.0},
        OAT7,
    ),
)


def same_model(row: Published | Reevaluation, model: str, template: str) -> bool:
    """Whether a row is about this model (a hub name, or a folder of that name) under this template.
    Others' prompts are not ours, so that a re-evaluation is about the model under any template."""
    name = model.rstrip("/").split("/")[-1]
    return bool(row.hub) and row.hub.split("/")[1] == name and row.template in ("", template)
