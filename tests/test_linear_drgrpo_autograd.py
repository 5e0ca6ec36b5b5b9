"""The fused head as a part of other programs: who gets a gradient, how often and with what factor;
autocast, torch.compile, FSDP2.

    pytest tests/test_linear_drgrpo_autograd.py
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drgrpo.kernels import linear_drgrpo as head
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss, linear_drgrpo_loss_ref, linear_logprob
from head_cases import (
    DEVICE,
    both,
    distance,
    ignore_numpy_warnings,
    make,
    needs_triton,
    run,
    uninitialized_memory_is_nan,
    use_blocks,
)

pytestmark = ignore_numpy_warnings


@pytest.fixture(autouse=True)
def nan_memory():
    with uninitialized_memory_is_nan():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    use_blocks(monkeypatch, 64, 2)


# ---- work and memory


class Tape(TorchDispatchMode):
    """The largest tensor made, and the number of GEMMs."""

    def __init__(self):
        super().__init__()
        self.largest, self.gemms = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.gemms += "mm" in func.__name__
        for x in tree_leaves(out):
            self.largest = max(self.largest, 0 if x is None else x.numel())
        return out


@pytest.fixture
def tape(monkeypatch):
    tape, original = Tape(), head._chunked_head

    def recorded(*args):
        with tape:
            return original(*args)

    monkeypatch.setattr(head, "_chunked_head", recorded)
    return tape


@both
@pytest.mark.parametrize(
    ("hidden", "weight", "gemms"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_gemms_that_are_not_needed_are_not_done(tape, backend, hidden, weight, gemms, small_blocks):
    case = make(8, 8, 50, on_policy=True)
    inputs = case.grad_inputs(hidden, weight)
    loss, _ = linear_drgrpo_loss(*inputs, backend=backend, chunk_tokens=4)
    assert tape.gemms == 2 * gemms
    assert loss.requires_grad == (hidden or weight)
    if loss.requires_grad:
        loss.backward()
    assert (inputs[0].grad is not None) == hidden
    assert (inputs[1].grad is not None) == weight


@both
def test_a_frozen_head_has_no_buffer_for_its_gradient(backend, small_blocks):
    """What LoRA trains: the gradient of the hidden states alone is kept."""
    inputs = make(4, 8, 100, on_policy=True).grad_inputs(weight=False)
    loss, _ = linear_drgrpo_loss(*inputs, backend=backend)
    assert sorted(x.numel() for x in loss.grad_fn.saved_tensors) == [0, 4 * 8]
    loss.backward()
    assert inputs[1].grad is None and inputs[0].grad.any()


@both
def test_without_grad_mode_there_is_one_gemm(tape, backend, small_blocks):
    for context in (torch.no_grad, torch.inference_mode):
        tape.gemms = 0
        with context():
            loss, _ = linear_drgrpo_loss(*make(8, 8, 50).grad_inputs(), backend=backend)
        assert tape.gemms == 1
        assert not loss.requires_grad


def test_no_tensor_is_as_large_as_the_logits(tape):
    T, V, chunk = 64, 500, 8
    run(linear_drgrpo_loss, make(T, 4, V), backend="torch", chunk_tokens=chunk)
    assert chunk * V <= tape.largest < T * V / 4


def test_the_loss_keeps_the_gradients_and_no_logits():
    """The torch backend differentiates the objective by autograd; that graph ends with the call."""
    T, D, V = 64, 4, 500
    loss, _ = linear_drgrpo_loss(*make(T, D, V).grad_inputs(), backend="torch", chunk_tokens=T)
    saved = loss.grad_fn.saved_tensors
    assert sorted(x.numel() for x in saved) == [T * D, V * D]
    assert all(x.grad_fn is None for x in saved)


# ---- gradients: how often, with what factor


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_factor(backend, dtype, small_blocks):
    """-0.3 is no bf16 number, and must not become one: the product is rounded, not its factors."""
    case = make(6, 8, 90, dtype, seed=18)
    one = run(linear_drgrpo_loss, case, backend=backend)
    scaled = run(linear_drgrpo_loss, case, backend=backend, upstream=-0.3)
    assert torch.equal(scaled[2], (one[2].float() * torch.tensor(-0.3)).to(dtype))
    assert distance(scaled[3], -0.3 * one[3].double()) <= 2 * torch.finfo(dtype).eps


def test_second_backward_is_refused():
    loss, _ = linear_drgrpo_loss(*make(4, 8, 50).grad_inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Call linear_drgrpo_loss again"):
        loss.backward()


def test_no_gradient_of_the_gradient():
    hidden, *inputs = make(4, 8, 50).grad_inputs()
    loss, _ = linear_drgrpo_loss(hidden, *inputs)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()


def test_functional_gradients_are_refused():
    hidden, *inputs = make(4, 8, 50).grad_inputs()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda hidden: linear_drgrpo_loss(hidden, *inputs)[0])(hidden.detach())


def test_tied_weights():
    """One parameter as embedding and head: both gradients arrive."""
    V, D, ids = 40, 8, torch.tensor([1, 5, 9], device=DEVICE)
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    advantage = torch.tensor([1.0, -1.0, 0.5], device=DEVICE)

    def gradient(function, dtype):
        weight = table.to(dtype).requires_grad_()
        hidden = torch.nn.functional.embedding(ids, weight)
        function(hidden, weight, ids + 1, advantage.to(dtype))[0].backward()
        return weight.grad

    exact = gradient(linear_drgrpo_loss_ref, torch.float64)
    assert distance(gradient(linear_drgrpo_loss, torch.float32), exact) <= 1e-5


@both
def test_autocast(backend, small_blocks):
    """fp32 master weights under autocast: computed in bf16, gradients in fp32."""
    case = make(8, 16, 100, seed=20, on_policy=True)
    how = dict(backend=backend, logits_dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, stats, dhidden, dweight = run(linear_drgrpo_loss, case, **how)
        logprob, _ = linear_logprob(case.hidden, case.weight, case.target, backend=backend)
    rounded = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    _, stats16, dhidden16, dweight16 = run(linear_drgrpo_loss, rounded, **how)
    assert dhidden.dtype == dweight.dtype == torch.float32
    assert torch.equal(stats["logprob"], stats16["logprob"])
    assert torch.equal(logprob, stats["logprob"])
    assert torch.equal(dhidden, dhidden16.float())
    assert torch.equal(dweight, dweight16.float())


# ---- torch.compile and custom operators


class Recorder:
    """A backend of torch.compile that runs every graph as it is and remembers its nodes."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        modules = [module for module in graph.modules() if hasattr(module, "graph")]
        self.graphs.append([str(node.target) for m in modules for node in m.graph.nodes])
        return graph


def compiled_step(case, backend):
    """A function of (hidden, weight) that returns (loss, mean entropy)."""

    def step(hidden, weight):
        loss, stats = linear_drgrpo_loss(
            hidden * 2,
            weight,
            case.target,
            case.advantage,
            old_logprob=case.old_logprob,
            sampler_logprob=case.sampler_logprob,
            tis_cap=1.2,
            scale=0.5,
            backend=backend,
        )
        return loss * 3, stats["entropy"].mean()

    return step


def step_and_backward(step, case):
    hidden, weight, *_ = case.grad_inputs()
    loss, entropy = step(hidden, weight)
    loss.backward()
    return loss.detach(), entropy, hidden.grad, weight.grad


@both
def test_compile_leaves_the_head_as_it_is(backend, small_blocks):
    """No GEMM of the head is in a graph, and the results have the same bits. The torch backend
    breaks the graph once, as Dynamo cannot trace its autograd call."""
    case, recorder = make(6, 8, 50, seed=21), Recorder()
    step = compiled_step(case, backend)
    eager = step_and_backward(step, case)
    compiled = step_and_backward(torch.compile(step, backend=recorder), case)
    for x, y in zip(eager, compiled, strict=True):
        assert torch.equal(x, y)
    assert recorder.graphs
    for nodes in recorder.graphs:
        assert not any("mm" in name for name in nodes)


@needs_triton
def test_compile_sees_one_node_of_the_triton_backend(small_blocks):
    case, recorder = make(6, 8, 50, seed=21), Recorder()
    step = compiled_step(case, "triton")
    step_and_backward(torch.compile(step, fullgraph=True, backend=recorder), case)
    (nodes,) = recorder.graphs
    assert sum("drgrpo" in name for name in nodes) == 1


def graphs_of(changing, monkeypatch):
    """Graphs that torch.compile makes of loss and log-prob while the token count or `scale` changes
    in every call. The token counts take 1 to 6 chunks."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def step(hidden, weight, target, advantage, scale):
        loss, _ = linear_drgrpo_loss(
            hidden * 2, weight, target, advantage, scale=scale, backend="triton"
        )
        return loss, linear_logprob(hidden * 2, weight, target, backend="triton")[0]

    monkeypatch.setattr(head, "default_chunk_tokens", lambda T, *_: min(T, 4))
    counter = CompileCounterWithBackend("aot_eager")  # the graphs that run, not Dynamo's alone
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(20):
        T, scale = (3 + i, 0.5) if changing == "tokens" else (5, 0.1 + 0.3 * i)
        inputs = make(T, 4, 20, on_policy=True, seed=i).grad_inputs()
        loss, logprob = compiled(*inputs, scale)
        loss.backward()
        want = step(*inputs, scale)
        assert torch.equal(loss, want[0]) and torch.equal(logprob, want[1])
    return counter.frame_count


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("changing", ["tokens", "scale"])
def test_compile_makes_one_graph_for_all_token_counts_and_scales(
    changing, small_blocks, monkeypatch
):
    """The first call's numbers are constants to Dynamo, so the second call makes the last graph."""
    torch.compiler.reset()
    assert graphs_of(changing, monkeypatch) <= 2


@needs_triton
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("reference", [False, True])
def test_operators_pass_torch_own_checks(needs, reference, small_blocks):
    case = make(5, 8, 30, seed=22)
    checks = ("test_schema", "test_faketensor")
    inputs = (case.hidden, case.weight, case.target)
    per_token = (case.advantage, case.old_logprob, None, case.ref_logprob if reference else None)
    scale = torch.ones(1, device=DEVICE)
    logits = (2, torch.float32, False)
    args = (*inputs, *per_token, scale, list(head._Objective()), *logits, *needs)
    torch.library.opcheck(head._triton_loss_op, args, test_utils=checks)
    args = (*inputs, 1.0, *logits)
    torch.library.opcheck(head._triton_logprob_op, args, test_utils=checks)


# ---- FSDP2


class FusedHead(torch.nn.Module):
    """A module whose forward calls the loss: FSDP2's hooks give it the full weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, hidden, target, advantage, old_logprob):
        return linear_drgrpo_loss(hidden, self.weight, target, advantage, old_logprob=old_logprob)


@pytest.fixture
def one_process_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_fsdp_unshards_for_a_module_and_a_sharded_weight_is_refused(one_process_mesh):
    from torch.distributed.fsdp import fully_shard

    case = make(5, 8, 30, seed=24).map(torch.Tensor.cpu)
    module = FusedHead(case.weight)
    fully_shard(module, mesh=one_process_mesh)
    with pytest.raises(TypeError, match=r"full_tensor\(\)"):
        linear_drgrpo_loss(case.hidden, module.weight, case.target, case.advantage)
    loss, _ = module(case.hidden, case.target, case.advantage, case.old_logprob)
    loss.backward()
    want = run(linear_drgrpo_loss, case)
    assert torch.equal(loss.detach(), want[0])
    assert torch.equal(module.weight.grad.full_tensor(), want[3])
