"""One process, one thread, no network, no GPU needed: what every test runs under."""

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NUMBA_NUM_THREADS"] = "1"  # Numba gives all of the process as many OpenMP threads
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from pathlib import Path

import pytest

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads round sums differently than one, and a fork of a process with two crashes. The
    number cannot be put back: vLLM makes `torch.set_num_threads` do nothing."""
    yield
    assert torch.get_num_threads() == 1, "a test or a library has changed the number of threads"


@pytest.fixture(scope="session")
def tokenizer():
    from drgrpo.tiny.tokenizer import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> str:
    """Hugging Face folder of a tiny Qwen2 with tied embeddings and random weights."""
    from drgrpo.tiny.warmup import Warmup, build_tiny_model

    path = tmp_path_factory.mktemp("models") / "random"
    build_tiny_model(Warmup(seed=3), path)
    return str(path)


@pytest.fixture(scope="session")
def warm_model() -> str:
    """The tiny recipe's model after its warm-up (a minute, once: `make train` fills and reads the
    same cache)."""
    from drgrpo.tiny.warmup import Warmup, cached_tiny_model

    return str(cached_tiny_model(Warmup(), ROOT / "runs" / "warmup"))


@pytest.fixture
def group_of_one():
    """A process group of this process alone, for what calls collectives."""
    from drgrpo import distributed

    distributed.start()
    yield
    distributed.stop()


@pytest.fixture
def restored_handlers():
    """The signal handlers of the test process, put back at the end."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_group_left_behind():
    """A run that fails half-way leaves its process group to the next test."""
    yield
    if "drgrpo.distributed" in sys.modules:
        sys.modules["drgrpo.distributed"].stop()


@pytest.fixture(scope="session")
def base(warm_model, tmp_path_factory):
    """(folder, metrics) of one short run that others are compared with."""
    from runs import run, small

    out = tmp_path_factory.mktemp("runs") / "base"
    return out, run(small(warm_model, out))
