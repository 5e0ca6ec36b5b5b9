"""The gate between trainer and sampler opens for rounding and shuts for everything else."""

import math
from types import SimpleNamespace

import pytest
import torch

from drgrpo.pack import Sequence, pack
from drgrpo.parity import check, gap, probe
from drgrpo.rollout import Sampler
from drgrpo.types import Batch, Completion, ParityError, Problem, Sampling

DISAGREEMENTS = [
    pytest.param(2e-4, 5e-4, torch.float32, id="mean"),
    pytest.param(1e-6, 2e-3, torch.float32, id="one token"),
    pytest.param(0.06, 2, torch.bfloat16, id="bf16 mean"),
    pytest.param(1e-3, 11, torch.bfloat16, id="bf16 one token"),
    pytest.param(0.02, 0.5, torch.float16, id="fp16 mean"),
    pytest.param(1e-3, 3, torch.float16, id="fp16 one token"),
    pytest.param(math.nan, 0, torch.float32, id="nan"),
]


@pytest.mark.parametrize(
    ("mean", "largest", "dtype"),
    [(1e-6, 3e-5, torch.float32), (3e-2, 1.0, torch.bfloat16), (3e-3, 0.2, torch.float16)],
    ids=["fp32 rounding", "bf16 rounding", "fp16 rounding"],
)
def test_rounding_passes(mean, largest, dtype):
    check(mean, largest, dtype)


@pytest.mark.parametrize(("mean", "largest", "dtype"), DISAGREEMENTS)
def test_more_stops_the_run_and_names_the_suspects(mean, largest, dtype):
    with pytest.raises(ParityError, match=r"lm_head.*prefix cache.*--parity warn"):
        check(mean, largest, dtype)


@pytest.mark.parametrize(("mean", "largest", "dtype"), DISAGREEMENTS)
def test_a_run_may_ask_for_a_warning_instead(mean, largest, dtype):
    logged = []
    check(mean, largest, dtype, "warn", logged.append)
    assert len(logged) == 1 and logged[0].startswith("WARNING: trainer and sampler disagree")


# ---- the probe at the end of a run


class FakeEngine:
    """A sampler of responses of 1 to 8 tokens, each with log-prob -1."""

    def __init__(self):
        self.asleep, self.requests = False, 0

    def generate(self, requests, sampling, on_finish, enough):
        self.requests += len(requests)
        for i in range(len(requests)):
            length = 1 + i % 8
            on_finish(i, Completion([i] * length, [-1.0] * length, True))

    def sleep(self):
        self.asleep = True


class FakePolicy(torch.nn.Linear):
    """Sees log-prob -1 - `wrong` for the first token of a batch and -1 for the others. Notes the
    batches, and whether the sampler slept."""

    def __init__(self, engine: FakeEngine, wrong: float = 0.0):
        super().__init__(1, 1)
        self.engine, self.wrong = engine, wrong
        self.slept: list[bool] = []
        self.batches: list[Batch] = []

    def logprob(self, batch):
        self.slept.append(self.engine.asleep)
        self.batches.append(batch)
        logprob_N = torch.full_like(batch.sampler_logprob_N, -1.0)
        logprob_N[:1] -= self.wrong
        return logprob_N


def probed(problems: int, budget: int, wrong: float = 0.0) -> tuple[FakePolicy, float, float]:
    """The policy of a probe with prompts of 3 tokens, and the mean and largest gap."""
    engine = FakeEngine()
    policy, tokenizer = FakePolicy(engine, wrong), SimpleNamespace(decode=lambda *a, **k: "")
    prompts = [Problem(i, "", "", [1, 2, 3]) for i in range(problems)]
    sampling = Sampling(max_new_tokens=8, stop_token_ids=(0,))
    return policy, *probe(Sampler(engine, tokenizer, seed=0), policy, prompts, sampling, budget)


@pytest.mark.parametrize("problems", [1, 100])
def test_the_probe_is_of_a_few_problems_with_the_sampler_asleep(group_of_one, problems):
    policy, mean, largest = probed(problems, budget=1000)
    assert policy.engine.requests == 4 * min(problems, 8) and policy.slept == [True]
    assert mean == largest == 0


def test_the_probe_keeps_the_budget_of_tokens(group_of_one):
    policy, mean, largest = probed(problems=8, budget=24, wrong=0.5)
    sizes = [len(batch.token_T) for batch in policy.batches]
    tokens = sum(len(batch.target_N) for batch in policy.batches)
    assert max(sizes) <= 24 and len(sizes) > 8 and all(policy.slept)
    assert tokens == 4 * sum(range(1, 9)), "every response is compared"
    assert largest == 0.5 and mean == pytest.approx(0.5 * len(sizes) / tokens)


def test_a_gap_is_nan_if_one_token_is(group_of_one):
    batches = [pack([Sequence([1], [2, 3], [-1.0, math.nan], 0.0)]), pack([])]
    with pytest.raises(ParityError):
        check(*gap(FakePolicy(FakeEngine()), batches), torch.float32)
