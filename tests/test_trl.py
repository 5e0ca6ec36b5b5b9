"""The fused head inside TRL's GRPOTrainer trains as TRL's own head does.

Every run is a real GRPOTrainer on the CPU: a tiny random model samples, is graded and takes
optimizer steps. Plain SGD with large steps keeps errors of rounding as small as they are.
"""

import gc
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: make env-test")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from drgrpo.kernels import linear_drgrpo
from drgrpo.kernels import trl as ours
from drgrpo.kernels.trl import DrGRPOTrainer, use_fused_head
from drgrpo.tiny.tokenizer import byte_tokenizer
from head_cases import distance, make, naive, rms

ARGUMENTS = dict(
    **dict(loss_type="dr_grpo", scale_rewards="none", temperature=0.9, max_completion_length=12),
    **dict(num_generations=4, per_device_train_batch_size=8, max_steps=3, logging_steps=1),
    **dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", save_strategy="no"),
    **dict(use_cpu=True, bf16=False, gradient_checkpointing=False),
    **dict(report_to="none", disable_tqdm=True),
)
KL = dict(beta=0.1, use_bias_correction_kl=False, num_iterations=2)
SCENARIOS = {
    "on-policy": {},
    "iterations": dict(num_iterations=3, epsilon=0.1, epsilon_high=0.15),
    "accumulation": dict(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4),
    "truncated": dict(mask_truncated_completions=True),
    "KL": KL,
    "LoRA": dict(num_iterations=2, lora=True),
    "LoRA, KL": dict(KL, lora=True),
}
QUICK = ("iterations", "accumulation", "LoRA, KL")
PROMPTS = ["ab", "cdefg", "x", "yzu"] * 4


def odd_share(completion_ids, **_) -> list[float]:
    """A reward that differs within a group."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def policy(path: str):
    """Every tenth token ends a response, so that lengths differ."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = list(range(0, 256, 10))
    return model


def make_trainer(kind: type, path: str, out: Path, model=None, lora=False, **changes):
    return kind(
        model or policy(path),
        odd_share,
        GRPOConfig(str(out), **{**ARGUMENTS, **changes}),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=byte_tokenizer(),
        # B starts at 0. A larger alpha moves it.
        peft_config=LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"]) if lora else None,
    )


def without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.endswith(("runtime", "per_second", "time"))}


def train(kind: type, path: str, out: Path, **changes) -> tuple[list[dict], torch.Tensor]:
    """(what TRL logged, all weights) of a run."""
    trainer = make_trainer(kind, path, out, **changes)
    trainer.train()
    history = [without_times(row) for row in trainer.state.log_history]
    return history, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_same_run(run, expected, start) -> None:
    (history, weights), (history_trl, weights_trl) = run, expected
    assert len(history) == len(history_trl) > 2
    for row, row_trl in zip(history, history_trl, strict=True):
        assert row == pytest.approx(row_trl, rel=1e-4, abs=1e-5)
    moved = (weights_trl - start).norm()
    assert moved > 0.1
    assert (weights - weights_trl).norm() < 1e-5 * moved


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Accelerate collects garbage around every run. That takes a second with this many modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def hook_restored():
    before = utils._ChunkedLogProbFunction
    yield
    utils._ChunkedLogProbFunction = before


@pytest.fixture(scope="module")
def trl_runs(random_model, tmp_path_factory):
    """TRL's own run of a scenario."""
    runs = {}

    def run(name: str):
        if name not in runs:
            out = tmp_path_factory.mktemp("trl")
            runs[name] = train(GRPOTrainer, random_model, out, **SCENARIOS[name])
        return runs[name]

    return run


def start_of(trainer_weights, path: str, lora: bool) -> torch.Tensor:
    """The weights before the run. Of an adapter only B moves far, and it starts at 0."""
    if lora:
        return torch.zeros_like(trainer_weights)
    return torch.cat([p.detach().flatten() for p in policy(path).parameters()])


@pytest.fixture
def gemms(monkeypatch) -> list:
    """Sizes of the products that the fused head computes. TRL's own head is out of order."""
    calls, original = [], linear_drgrpo._matmul

    def spy(a, b, *args, **options):
        calls.append((*a.shape, b.shape[1]))
        return original(a, b, *args, **options)

    def out_of_order(*_):
        raise AssertionError("TRL's own head was called")

    monkeypatch.setattr(linear_drgrpo, "_matmul", spy)
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "forward", out_of_order)
    return calls


# ---- whole runs


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCENARIOS]
)
@pytest.mark.parametrize("kind", [GRPOTrainer, DrGRPOTrainer])
def test_a_run_is_that_of_trl(kind, name, random_model, tmp_path, trl_runs, request):
    history, weights = expected = trl_runs(name)
    request.getfixturevalue("gemms")  # after TRL's run
    if kind is GRPOTrainer:
        use_fused_head()
    run = train(kind, random_model, tmp_path, **SCENARIOS[name])
    lora = SCENARIOS[name].get("lora", False)
    assert_same_run(run, expected, start_of(weights, random_model, lora))
    if SCENARIOS[name].get("num_iterations", 1) > 1:
        assert max(row.get("clip_ratio/region_mean", 0) for row in history) > 0.01
    if "beta" in SCENARIOS[name]:
        assert max(row.get("kl", 0) for row in history) > 1e-3


@pytest.mark.parametrize(
    ("kind", "lora", "expected"),
    [
        (GRPOTrainer, False, 4),
        (DrGRPOTrainer, False, 3),
        (GRPOTrainer, True, 3),
        (DrGRPOTrainer, True, 2),
    ],
)
def test_one_pass_takes_three_gemms(kind, lora, expected, random_model, tmp_path, gemms):
    """A frozen head takes one less. With all positions, TRL gives prompts and padding too."""
    use_fused_head()
    train(kind, random_model, tmp_path, max_steps=1, lora=lora)
    assert len(gemms) == expected
    tokens, width, vocabulary = gemms[0]
    assert (width, vocabulary) == (64, 260)
    assert (tokens < 8 * 12) == (kind is DrGRPOTrainer)


def test_evaluation(random_model, tmp_path):
    options = dict(per_device_eval_batch_size=8, gradient_accumulation_steps=2)
    logs = []
    for kind in (GRPOTrainer, DrGRPOTrainer):
        trainer = make_trainer(kind, random_model, tmp_path, **options)
        torch.manual_seed(0)
        logs.append(trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:4]})))
    expected, found = map(without_times, logs)
    assert abs(expected["eval_loss"]) > 1e-4 and "eval_entropy" in expected
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_processes(random_model, tmp_path):
    """Gradients are averaged, metrics are reduced."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", __file__, random_model, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, *others = (torch.load(tmp_path / f"{i}.pt") for i in range(3))
    start = start_of(expected[1], random_model, lora=False)
    for run in others:
        assert_same_run(run, expected, start)
    assert max(row.get("clip_ratio/high_max", 0) for row in expected[0]) > 0.01


def main(path: str, out: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    options = dict(num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=2)
    runs = [train(GRPOTrainer, path, out, **options)]
    runs.append(train(DrGRPOTrainer, path, out, **options))
    use_fused_head()
    runs.append(train(GRPOTrainer, path, out, **options))
    if os.environ["RANK"] == "0":
        for i, run in enumerate(runs):
            torch.save(run, out / f"{i}.pt")


# ---- one micro-batch, with what the runs above do not have


def micro_batch(B: int = 8, P: int = 5, L: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    length = torch.tensor([L, 1, 2, 3, 4, 5, L, 3])
    before = torch.tensor([P, 1, 2, 3, 4, 5, P, 2])
    return {
        "prompt_ids": torch.randint(256, (B, P), generator=rng),
        "prompt_mask": (torch.arange(P) >= P - before[:, None]).long(),
        "completion_ids": torch.randint(256, (B, L), generator=rng),
        "completion_mask": (torch.arange(L) < length[:, None]).long(),
        "advantages": torch.randn(B, generator=rng),
        "old_per_token_logps": -5.6 + 0.3 * torch.randn(B, L, generator=rng),
        "num_items_in_batch": length.sum(),
    }


def of_tools(inputs: dict) -> dict:
    """Every third token was written by a tool."""
    L = inputs["completion_ids"].shape[1]
    return {"tool_mask": (torch.arange(L) % 3 > 0).long().expand_as(inputs["completion_ids"])}


def of_vllm(shape: tuple[int, int], masked: bool) -> dict:
    ratio = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2
    return {"importance_sampling_ratio": ratio.masked_fill(ratio > 1.5, 0) if masked else ratio}


CHANGES = {
    "off-policy": lambda inputs: {},
    "on-policy": lambda inputs: {"old_per_token_logps": None},
    "tools": of_tools,
    "vLLM, tokens": lambda inputs: of_vllm((8, 6), masked=False),
    "vLLM, responses": lambda inputs: of_vllm((8, 1), masked=True),
    "advantages of tokens": lambda inputs: {
        "advantages": torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    },
    "prompts of one token": lambda inputs: {
        name: inputs[name][:, -1:] for name in ("prompt_ids", "prompt_mask")
    },
    "no token": lambda inputs: {"completion_mask": torch.zeros(8, 6, dtype=torch.long)},
}


@pytest.fixture(scope="module")
def trainers(random_model, tmp_path_factory):
    """TRL's and ours."""
    out = tmp_path_factory.mktemp("trainers")
    return [make_trainer(kind, random_model, out) for kind in (GRPOTrainer, DrGRPOTrainer)]


def loss_of(trainer, inputs: dict):
    """(loss, gradients, metrics) of a micro-batch, one of two."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    trainer.use_vllm = "importance_sampling_ratio" in inputs
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grads = [p.grad for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    metrics = dict(trainer._metrics["train"])
    trainer._metrics["train"].clear()
    return loss.detach(), grads, metrics


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_micro_batch_is_that_of_trl(name, compact, trainers, monkeypatch):
    """`compact`: as on a GPU, TRL gives the positions that are scored and no others."""
    monkeypatch.setattr(utils, "_use_triton", lambda device: compact)
    inputs = micro_batch()
    inputs |= CHANGES[name](inputs)
    inputs = {name: value for name, value in inputs.items() if value is not None}
    (loss, grads, metrics), ours_found = (loss_of(trainer, inputs) for trainer in trainers)
    loss_ours, grads_ours, metrics_ours = ours_found
    assert (loss == 0) == (name == "no token")
    assert torch.allclose(loss_ours, loss, rtol=1e-5, atol=1e-8)
    for grad, grad_ours in zip(grads, grads_ours, strict=True):
        assert distance(grad_ours, grad, floor=1e-6) < 1e-4
    assert metrics_ours == {k: pytest.approx(v, nan_ok=True) for k, v in metrics.items()}
    if name != "on-policy" and name != "no token":
        assert metrics["clip_ratio/low_mean"][0] > 0 and metrics["clip_ratio/high_mean"][0] > 0


# ---- 16 bits


@pytest.mark.parametrize("logits_dtype", [torch.float32, "shifted"])
def test_16_bits_have_the_same_logits_in_both_passes(logits_dtype, monkeypatch):
    asked = []
    for name in ("linear_logprob", "linear_drgrpo_loss"):
        original = getattr(ours, name)

        def spy(*args, original=original, **options):
            asked.append(options["logits_dtype"])
            return original(*args, **options)

        monkeypatch.setattr(ours, name, spy)
    case = make(64, 32, 500, torch.bfloat16, spread=4.0)
    hidden, weight, target, _ = case.grad_inputs()
    with use_fused_head(logits_dtype) as head:
        logprob, *_ = head.apply(hidden, weight, None, target, 1.0, 0, outputs=("log_probs",))
    (logprob * case.advantage).sum().backward()
    assert asked == [logits_dtype, logits_dtype]
    exact_hidden, exact_weight, *_ = case.double().grad_inputs()
    logits = exact_hidden @ exact_weight.T
    exact = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    (exact * case.advantage).sum().backward()
    assert rms(logprob, exact) < (1e-5 if logits_dtype == torch.float32 else 5e-3)
    plain_hidden, plain_weight, *_ = case.grad_inputs()
    loss, _ = naive(plain_hidden, plain_weight, target, -case.advantage)
    loss.backward()
    for grad, plain, reference in (
        (hidden.grad, plain_hidden.grad, exact_hidden.grad),
        (weight.grad, plain_weight.grad, exact_weight.grad),
    ):
        assert distance(grad, reference) < 1.1 * distance(plain, reference)


def test_autocast_holds_in_the_backward_pass():
    """TRL trains fp32 weights in bf16 by autocast, which ends before the backward pass."""
    case = make(32, 16, 100)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, target, _ = case.grad_inputs()
        inputs = hidden.to(dtype), weight.to(dtype), None, target, 0.7, 0
        with use_fused_head() as head, torch.autocast("cpu", torch.bfloat16):
            logprob, *_ = head.apply(*inputs)
        (logprob * case.advantage).sum().backward()
        grads.append((logprob, hidden.grad, weight.grad))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert not torch.equal(grads[0][2], torch.zeros_like(weight))


def test_zero_3_gathers_the_weight_in_the_backward_pass(monkeypatch):
    """DeepSpeed has given the weight away after the forward pass."""
    case = make(8, 4, 20)
    hidden, weight, target, _ = case.grad_inputs()
    with use_fused_head() as head:
        logprob, *_ = head.apply(hidden, weight, None, target, 1.0, 0)
    gathered, original = [], utils.maybe_gather_lm_head_ctx

    def spy(*params):
        gathered.append(params[0])
        return original(*params)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", spy)
    logprob.sum().backward()
    assert len(gathered) == 1 and gathered[0] is weight


def test_a_weight_of_another_type_is_cast_as_trl_casts_it():
    case = make(16, 8, 50)
    for inputs in ((case.hidden.bfloat16(), case.weight), (case.hidden, case.weight.bfloat16())):
        hidden, weight = (x.detach().requires_grad_() for x in inputs)
        with use_fused_head() as head:
            logprob, *_ = head.apply(hidden, weight, None, case.target, 1.0, 0)
        logprob.sum().backward()
        assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype


# ---- where the head is


def test_the_head_goes_in_and_out(random_model, tmp_path):
    original = utils._ChunkedLogProbFunction
    with use_fused_head() as head:
        assert utils._ChunkedLogProbFunction is head
    assert utils._ChunkedLogProbFunction is original
    trainer = make_trainer(DrGRPOTrainer, random_model, tmp_path)
    trainer.compute_loss(trainer.model.eval(), micro_batch())
    assert utils._ChunkedLogProbFunction is original
    head = use_fused_head()
    assert utils._ChunkedLogProbFunction is head


def test_the_logits_of_the_old_log_probs_are_those_of_the_loss(random_model, tmp_path, monkeypatch):
    asked = []

    def spy(logits_dtype):
        asked.append(logits_dtype)
        return use_fused_head(logits_dtype)

    monkeypatch.setattr(ours, "use_fused_head", spy)
    trainer = make_trainer(DrGRPOTrainer, random_model, tmp_path)
    tokens = torch.ones(1, 4, dtype=torch.long)
    for logits_dtype in (None, "shifted"):
        trainer.logits_dtype = logits_dtype
        if logits_dtype:
            trainer.model.bfloat16()
        trainer._get_per_token_logps_and_entropies(trainer.model, tokens, tokens, 2)
    assert asked == [torch.float32, "shifted"]


# ---- refusals


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss_type="dapo"),
        dict(importance_sampling_level="sequence"),
        dict(delta=4.0),
        dict(top_entropy_quantile=0.2),
        dict(entropy_coef=0.01),
        dict(use_adaptive_entropy=True),
        dict(off_policy_mask_threshold=0.5),
        dict(use_bias_correction_kl=True, beta=0.1),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_another_loss_are_refused_before_a_model_is_loaded(changes, tmp_path):
    name, value = next(iter(changes.items()))
    arguments = GRPOConfig(str(tmp_path), **{**ARGUMENTS, **changes})
    with pytest.raises(ValueError, match=rf"^{name} \({value!r}\): .* only\. Set it in GRPOConfig"):
        DrGRPOTrainer("no-such-model", odd_share, arguments)


def test_the_settings_of_the_loss_are_required():
    with pytest.raises(ValueError, match="args=GRPOConfig"):
        DrGRPOTrainer("no-such-model", odd_share)


def test_every_setting_of_trls_loss_is_known():
    """`_compute_loss` of another version may read settings that this list does not have."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    read = set(re.findall(r"self\.(?:args\.)?(\w+)", source))
    fields = set(GRPOConfig.__dataclass_fields__)
    other_losses = {name for name in fields if name.startswith(("sapo_", "vespo_"))}
    adaptive = {name for name in fields if name.startswith("entropy_")} - {"entropy_coef"}
    served = {"beta", "max_completion_length", "use_vllm", "vllm_importance_sampling_correction"}
    served |= {"epsilon_high", "router_aux_loss_coef", "use_bias_correction_kl"}
    of_dapo = {"steps_per_generation"}
    known = set(ours.SETTINGS) | other_losses | adaptive | served | of_dapo
    assert read & fields <= known
    assert set(ours.SETTINGS) <= read & fields


def test_experts_are_refused(random_model, tmp_path):
    model = policy(random_model)
    model.config.output_router_logits, model.config.router_aux_loss_coef = False, 0.1
    with pytest.raises(ValueError, match=r"router_aux_loss_coef \(0\.1\).*Set it to 0"):
        make_trainer(DrGRPOTrainer, random_model, tmp_path, model=model)
    make_trainer(DrGRPOTrainer, random_model, tmp_path, model=model, router_aux_loss_coef=0.0)


def test_images_are_refused(random_model, tmp_path, monkeypatch):
    original = GRPOTrainer.__init__

    def with_a_processor(self, *args, **options):
        original(self, *args, **options)
        self._is_vlm = True

    monkeypatch.setattr(GRPOTrainer, "__init__", with_a_processor)
    with pytest.raises(ValueError, match="pass a tokenizer, not a processor"):
        make_trainer(DrGRPOTrainer, random_model, tmp_path)


def bias(model) -> None:
    model.lm_head = torch.nn.Linear(64, 260)


def soft_cap(model) -> None:
    model.config.final_logit_softcapping = 30.0


def logit_scale(model) -> None:
    model.config.logit_scale = 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bias, "a bias"),
        (soft_cap, r"final_logit_softcapping \(30.0\)"),
        (logit_scale, r"a scale of the logits \(2.0\)"),
    ],
)
@pytest.mark.parametrize("kind", [GRPOTrainer, DrGRPOTrainer])
def test_heads_with_more_than_a_weight_are_refused(kind, change, message, random_model, tmp_path):
    model = policy(random_model)
    change(model)
    trainer = make_trainer(kind, random_model, tmp_path, model=model)
    with use_fused_head(), pytest.raises(ValueError, match=f"does not compute {message}: train"):
        trainer.compute_loss(trainer.model.eval(), micro_batch())


def test_statistics_of_trls_other_trainers_are_refused(random_model):
    model = policy(random_model)
    utils.add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    tokens = torch.ones(1, 4, dtype=torch.long)
    with use_fused_head(), pytest.raises(ValueError, match=r"the outputs \['is_top1'\]"):
        model(tokens, labels=tokens, fused_lm_head=True)


def test_the_gradient_of_the_entropy_is_refused(random_model, tmp_path):
    use_fused_head()
    with pytest.raises(RuntimeError, match="set entropy_coef=0 and"):
        train(GRPOTrainer, random_model, tmp_path, entropy_coef=0.01)


def test_another_version_of_trl_is_refused(monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"functions of TRL 1\.16, and TRL 1\.17\.0 is.*1\.16\.0"):
        runpy.run_path(ours.__file__)
    ours.check_version("1.16.3")
    for version in ("1.1.6", "1.160.0", "2.16.0", "0.21"):
        with pytest.raises(ImportError, match=version):
            ours.check_version(version)


def test_a_missing_trl_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"not installed: pip install trl==1\.16\.0"):
        runpy.run_path(ours.__file__)


def test_the_pin_is_the_version_the_module_is_written_for():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert text.count(f'"trl=={ours.TRL}.0"') == 2


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
