"""A supervised phase learns, is cached by its inputs, and leaves nothing half-made behind."""

import re
import threading
import time
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM

from drgrpo import imitation
from drgrpo.imitation import Schedule, cached, demonstration, imitate
from drgrpo.pack import pack

SHORT = Schedule(steps=2, batch=2, lr=1e-3, lr_warmup=1)


def make(path):
    path.mkdir()
    (path / "model").touch()


def test_a_model_is_made_once_for_its_inputs(tmp_path):
    made, log = [], []

    def noted(path):
        made.append(path.name)
        make(path)

    paths = [cached("a", inputs, tmp_path, noted, log.append) for inputs in ([1], [2], [1])]
    assert len(made) == 2 and paths[0] == paths[2] != paths[1]
    assert log == [f"warm-up: from the cache, {paths[0]}"]


@pytest.mark.parametrize("library", [imitation.torch, imitation.transformers], ids=str)
def test_other_versions_have_another_model(tmp_path, monkeypatch, library):
    before = cached("a", [], tmp_path, make, print)
    monkeypatch.setattr(library, "__version__", "0")
    assert cached("a", [], tmp_path, make, print) != before


def test_one_that_dies_leaves_no_model_under_the_final_name(tmp_path):
    def die(path):
        make(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("a", [], tmp_path, die, print)
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial", ".lock"}


def test_a_second_run_waits_for_the_model_that_the_first_one_makes(tmp_path):
    made, begun, second = [], threading.Event(), []

    def slow(path):
        begun.set()
        time.sleep(0.2)
        made.append(path)
        make(path)

    def other():
        begun.wait()
        second.append(cached("a", [], tmp_path, slow, print))

    thread = threading.Thread(target=other)
    thread.start()
    first = cached("a", [], tmp_path, slow, print)
    thread.join()
    assert len(made) == 1 and second == [first]


def test_every_step_has_its_own_gradient(random_model, tmp_path, monkeypatch):
    policies, lengths, weights = [], [], []

    class Noted(imitation.Policy):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            policies.append(self)

        def loss(self, batch, scale):
            weights.append(scale * len(batch.target_N))
            return super().loss(batch, scale)

    def noted_pack(batch):
        assert all(p.grad is None for p in policies[0].parameters())
        lengths.append(len(batch))
        return pack(batch)

    monkeypatch.setattr(imitation, "Policy", Noted)
    monkeypatch.setattr(imitation, "pack", noted_pack)
    copytree(random_model, tmp_path / "model")
    batches = iter(
        [[demonstration([1, 2], [3])], [demonstration([1], [2]), demonstration([4], [5])]]
    )
    imitate(tmp_path / "model", SHORT, batches)
    assert lengths == [1, 2] and len(policies) == 1
    assert weights == [1.0, 1.0], "the loss is a mean over tokens"


def test_the_learning_rate_rises_and_falls(random_model, tmp_path, monkeypatch):
    rates, norms = [], []
    step = imitation.torch.optim.AdamW.step

    def noted(self):
        (group,) = self.param_groups
        rates.append(group["lr"])
        norms.append(imitation.torch.nn.utils.get_total_norm([p.grad for p in group["params"]]))
        step(self)

    monkeypatch.setattr(imitation.torch.optim.AdamW, "step", noted)
    copytree(random_model, tmp_path / "model")
    schedule = Schedule(steps=4, batch=1, lr=1.0, lr_warmup=2)
    imitate(tmp_path / "model", schedule, iter([[demonstration([1], [2])]] * 4))
    assert rates == [0.5, 0.75, 0.5, 0.25]
    assert norms[0] == pytest.approx(1.0, abs=1e-4), "a larger gradient is clipped"


def test_it_learns_what_it_is_shown(random_model, tmp_path):
    log = []
    copytree(random_model, tmp_path / "model")
    schedule = Schedule(steps=40, batch=1, lr=3e-3, lr_warmup=4)
    imitate(tmp_path / "model", schedule, iter([[demonstration([1, 2], [3, 4])]] * 40), log.append)
    losses = [float(re.search(r"nll/token ([\d.]+)", line)[1]) for line in log]
    assert len(losses) == 8 and losses[-1] < 0.5 < losses[0]
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert lm.generate(torch.tensor([[1, 2]]), max_new_tokens=2).tolist() == [[1, 2, 3, 4]]
