"""LoRA: training the factors is full training restricted to them, and the sampler, the checkpoint
and every number of processes see the merged weights."""

import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import train
from drgrpo import model, parity
from drgrpo.config import RECIPES, parse_args
from drgrpo.engine_torch import TorchEngine
from drgrpo.lora import Adapter, WithoutAdapter
from drgrpo.model import Objective, Policy, load_policy
from drgrpo.pack import Sequence, pack
from drgrpo.types import UserError
from runs import assert_close_run, assert_same_run, finish, launch, metrics, run, small, weights

CPU = torch.device("cpu")
ADAPTER = Adapter(rank=4, alpha=8)
LORA = {"lora_rank": 4, "lora_alpha": 8, "lr": 3e-3}
"""Ten times tiny's learning rate."""


def load(path: str, adapter: Adapter = ADAPTER, dtype: torch.dtype = torch.float32, **options):
    return load_policy(path, Objective(), dtype=dtype, device=CPU, adapter=adapter, **options)


def factors(policy: Policy) -> dict[str, torch.Tensor]:
    """What is trained, by name."""
    return {name: p for name, p in policy.lm.named_parameters() if p.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(policy: Policy, size: float = 0.1) -> Policy:
    """The same policy with a random B in place of 0."""
    generator = torch.Generator().manual_seed(1)
    for name, factor in factors(policy).items():
        if "lora_B" in name:
            local = factor.to_local() if isinstance(factor, DTensor) else factor
            local.data.normal_(std=size, generator=generator)
    return policy


TOKENS = torch.randint(260, (5, 16), generator=torch.Generator().manual_seed(0)).tolist()


def batch():
    """Five responses of twelve tokens."""
    return pack([Sequence(t[:4], t[4:], [-1.0] * 12, 0.5 - i % 2) for i, t in enumerate(TOKENS)])


# ---- what is computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_changes_nothing(random_model, group_of_one, dtype):
    plain, policy = load(random_model, Adapter(), dtype), load(random_model, dtype=dtype)
    assert torch.equal(plain.logprob(batch()), policy.logprob(batch()))
    ours, theirs = (dict(p.named_weights(dtype)) for p in (policy, plain))
    assert list(ours) == list(theirs), "the sampler knows the base model's names, in its order"
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_seed_draws_the_factors_and_the_global_generator_is_left_alone(random_model):
    state = torch.get_rng_state()
    one, same, other = (
        torch.cat(
            [p.flatten() for p in factors(load(random_model, replace(ADAPTER, seed=s))).values()]
        )
        for s in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_is_full_training_restricted_to_the_factors(
    random_model, group_of_one, checkpointing
):
    """dA = s B^T dW and dB = s dW A^T, with dW by autograd in float64 through transformers."""
    config = small(random_model, "unused", lora_rank=4, lora_alpha=8, max_grad_norm=1e9)
    config = replace(config, checkpointing=checkpointing, lora_targets="q_proj,down_proj")
    policy, _, _ = train.load_policies(config, random_model, CPU)
    fill(policy)
    before = {name: factor.detach().clone() for name, factor in factors(policy).items()}
    assert len(before) == 2 * 2 * 2, "two factors, two targets, two blocks"

    lm = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float64)
    merged = dict(policy.named_weights(torch.float32))
    lm.load_state_dict({name: weight.double() for name, weight in merged.items()})
    data, total = batch(), 0.0
    for i, tokens in enumerate(map(torch.tensor, TOKENS)):
        logp = torch.log_softmax(lm(tokens[None]).logits[0, 3:-1], -1)
        total += (0.5 - i % 2) * logp.gather(1, tokens[4:, None]).sum()
    (-total / (config.minibatch_size * config.max_new_tokens)).backward()

    optimizer = torch.optim.SGD(factors(policy).values(), lr=1.0)
    data.sampler_logprob_N = policy.logprob(data)
    train.train_minibatch(config, policy, optimizer, [data], lr=100.0)
    for name, factor in factors(policy).items():
        layer, _, rest = name.partition(".lora_")
        full_gradient = lm.get_parameter(f"{layer}.weight").grad
        a, b = (before[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
        gradient = 2 * (b.T @ full_gradient if rest[0] == "A" else full_gradient @ a.T)
        moved = (before[name] - factor.detach()) / 100
        assert (moved - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_optimizer_holds_the_factors_and_the_head_gets_no_gradient(random_model, group_of_one):
    for dtype in ("float32", "bfloat16"):
        config = small(random_model, "unused", lora_rank=4, dtype=dtype)
        policy, _, optimizer = train.load_policies(config, random_model, CPU)
        policy.loss(batch(), 1.0)[0].backward()
        ((group),) = optimizer.param_groups
        trained = {name: p for name, p in policy.lm.named_parameters() if p.grad is not None}
        assert len(trained) == 2 * 7 * 2, "two factors of seven linear layers in two blocks"
        assert set(map(id, group["params"])) == set(map(id, trained.values()))
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
        frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
        assert frozen == {getattr(torch, dtype)}


@pytest.mark.slow
def test_compiled_blocks_with_an_adapter_compute_the_same(random_model):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    results = []
    for compile in (False, True):
        policy = fill(load(random_model, compile=compile))
        loss, stats = policy.loss(batch(), scale=0.25)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in factors(policy).values()])
        results.append((stats["logprob"], gradient))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


def test_the_reference_of_a_kl_penalty_is_the_base_model(random_model, group_of_one):
    config = small(random_model, "unused", lora_rank=4, kl_coef=0.1)
    policy, reference, _ = train.load_policies(config, random_model, CPU)
    base_N, logprob_N = policy.logprob(batch()), fill(policy).logprob(batch())
    assert isinstance(reference, WithoutAdapter) and not torch.equal(logprob_N, base_N)
    assert torch.equal(reference.logprob(batch()), base_N)
    assert torch.equal(policy.logprob(batch()), logprob_N), "the adapter is back"


# ---- merged weights


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
    ids=str,
)
def test_merged_weights_compute_what_the_adapter_computes(
    random_model, group_of_one, tmp_path, dtype, limit
):
    policy = fill(load(random_model, dtype=dtype))
    merged = load(random_model, Adapter(), dtype)
    merged.lm.save_pretrained(tmp_path, state_dict=dict(policy.named_weights(dtype)))
    merged = load(str(tmp_path), Adapter(), dtype)
    gap_N = (merged.logprob(batch()) - policy.logprob(batch())).abs()
    moved_N = (
        load(random_model, Adapter(), dtype).logprob(batch()) - merged.logprob(batch())
    ).abs()
    assert gap_N.max() <= limit < moved_N.mean()
    parity.check(gap_N.mean().item(), gap_N.max().item(), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_samples_from_the_merged_weights(warm_model, tmp_path, dtype):
    """The gate compares every step, and the probe at the end."""
    config = small(warm_model, tmp_path / "run", **LORA, dtype=dtype, kl_coef=0.01, steps=3)
    rows = run(config)
    limit_mean, limit_max = parity.LIMITS[getattr(torch, dtype)]
    for row in rows:
        assert row["parity_mean"] <= limit_mean and row["parity_max"] <= limit_max
    assert 0 < rows[0]["kl"] < rows[-1]["kl"]
    before, after = weights_of(warm_model), weights(tmp_path / "run")
    rounded = {name: w.to(getattr(torch, dtype)).float() for name, w in before.items()}
    changed = {name.split(".")[-2] for name in after if not torch.equal(rounded[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def weights_of(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


@pytest.mark.slow
def test_a_sampler_without_the_adapter_is_noticed(warm_model, tmp_path, monkeypatch):
    original = TorchEngine.sync

    def base_only(self, named_weights):
        original(self, weights_of(warm_model).items())
        list(named_weights)

    monkeypatch.setattr(TorchEngine, "sync", base_only)
    with pytest.raises(parity.ParityError):
        run(small(warm_model, tmp_path / "run", **LORA))


# ---- checkpoints and processes

SETTINGS = LORA | {"save_every": 1, "eval_every": 1, "steps": 3, "keep": 3}


@pytest.fixture(scope="module")
def straight(warm_model, tmp_path_factory):
    """Three steps without interruption."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(small(warm_model, out, **SETTINGS))
    return out


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(warm_model, straight, tmp_path):
    run(small(warm_model, tmp_path / "halves", **SETTINGS | {"steps": 1}))
    run(small(warm_model, tmp_path / "halves", **SETTINGS))
    assert_same_run(straight, tmp_path / "halves")
    one, other = (load_file(out / "adapter" / FILE) for out in (straight, tmp_path / "halves"))
    assert len(one) == 28 and all(torch.equal(one[name], other[name]) for name in one)


FILE = "adapter_model.safetensors"


@pytest.mark.slow
def test_the_saved_adapter_on_the_base_model_is_the_saved_model(warm_model, straight):
    base = AutoModelForCausalLM.from_pretrained(warm_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, straight / "adapter")
    assert "library_name: peft" in (straight / "adapter" / "README.md").read_text()
    assert model.peft_config["default"].base_model_name_or_path == warm_model
    merged, ours = model.merge_and_unload().state_dict(), weights(straight)
    before = weights_of(warm_model)
    assert any(not torch.equal(before[name], ours[name]) for name in ours)
    for name, weight in ours.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_holds_no_frozen_weight_but_in_hf(straight):
    state = straight / "checkpoints" / "latest" / "state"
    names = FileSystemReader(state).read_metadata().state_dict_metadata
    assert names and all("lora_" in name for name in names if name.startswith("weights"))


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [1, 2])
def test_two_processes_equal_one(warm_model, straight, tmp_path, replicate):
    config = small(warm_model, tmp_path / "two", **SETTINGS | {"dp_replicate": replicate})
    finish(launch(config, processes=2))
    assert_close_run(straight, tmp_path / "two")


@pytest.mark.slow
def test_two_processes_share_a_frozen_bfloat16_base(warm_model, tmp_path):
    """FSDP2 shards it beside float32 factors, and the same command resumes."""
    settings = LORA | {"dtype": "bfloat16", "checkpointing": "full", "save_every": 1}
    run(small(warm_model, tmp_path / "one", **settings, steps=1))
    for steps in (1, 2):
        finish(launch(small(warm_model, tmp_path / "two", **settings, steps=steps), processes=2))
    one, two = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    for column in ("loss", "grad_norm", "reward_mean"):
        assert one[column] == pytest.approx(two[column], rel=0.02), column
    assert [row["step"] for row in metrics(tmp_path / "two")] == [1, 2]


# ---- the command line


def test_rank_zero_is_full_training():
    assert RECIPES["tiny"]().lora_rank == 0
    config = parse_args(["--recipe", "tiny", "--lora-rank", "0"])
    assert config == parse_args(["--recipe", "tiny"]) and "LoRA" not in config.derived()


def test_without_lr_lora_takes_ten_times_the_recipes():
    argv = ["--recipe", "oat_zero_7b", "--lora-rank", "32", "--lora-alpha", "64"]
    config = parse_args(argv)
    assert config.lr == 1e-5
    assert "LoRA of rank 32 on all-linear, scaled by 64/32, lr 1e-05" in config.derived()
    assert parse_args([*argv, "--lr", "1e-6"]).lr == 1e-6


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter(4, targets="q_prok"), "did you mean 'q_proj'"),
        (Adapter(4, targets="lm_head"), "there are all-linear, q_proj, k_proj, v_proj, o_proj, ga"),
        (Adapter(4, targets=","), "unknown --lora-targets ','"),
        (Adapter(33), r"--lora-rank 33 exceeds the width of k_proj, which is 32; .* leave k_proj"),
        (Adapter(65, targets="gate_proj"), "exceeds the width of gate_proj, which is 64"),
        (Adapter(65, targets="o_proj,q_proj"), "exceeds the width of o_proj, which is 64"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(
    random_model, adapter, message, monkeypatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match=message):
        load(random_model, adapter)


def test_the_early_check_allocates_no_weights(random_model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        model, "target_layers", lambda lm, adapter: seen.extend(p.device for p in lm.parameters())
    )
    load(random_model)
    assert {device.type for device in seen} == {"meta"}


def test_a_rank_may_be_as_large_as_the_narrowest_width(random_model):
    assert len(factors(load(random_model, Adapter(32)))) == 2 * 7 * 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (("--lora-rank", "-1"), "--lora-rank -1 must be 0 or a positive number"),
        (("--lora-alpha", "0"), "--lora-alpha 0 must be a positive number"),
    ],
)
def test_numbers_out_of_range_are_refused(flag, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--recipe", "tiny", *flag])
