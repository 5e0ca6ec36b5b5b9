"""README's table "to change | edit" is true: each row's edit changes a run.

A row names `file:thing`. The test replaces exactly that thing and looks at what a run leaves."""

import re
import shlex
from dataclasses import replace

import pytest
import torch

import train
from conftest import ROOT
from drgrpo import advantage, config, data, templates
from drgrpo.engine_torch import TorchEngine
from drgrpo.kernels import linear_drgrpo
from drgrpo.run.files import read_jsonl
from drgrpo.templates import Template
from runs import run, small

STEP = {"steps": 1, "eval_data": ""}


def reward(patch):
    patch.setattr(train, "reward", lambda rollout, grade: rollout.length / 10)
    return lambda out, row, base: row["reward_mean"] > 1


def group_advantage(patch):
    patch.setattr(train, "group_advantage", lambda *args: 2 * original(*args))
    original = advantage.group_advantage
    return lambda out, row, base: row["grad_norm"] == pytest.approx(2 * base["grad_norm"], rel=0.1)


def token_weight(patch):
    patch.setattr(train, "token_weight", lambda length_B, algo, budget: torch.zeros(len(length_B)))
    return lambda out, row, base: row["grad_norm"] == 0


def token_objective(patch):
    original = linear_drgrpo.token_objective

    def doubled(logprob, *args, **kwargs):
        loss, stats = original(logprob, *args, **kwargs)
        return 2 * loss, stats

    patch.setattr(linear_drgrpo, "token_objective", doubled)
    return lambda out, row, base: row["grad_norm"] == pytest.approx(2 * base["grad_norm"], rel=0.1)


def learning_rate(patch):
    patch.setattr(train, "learning_rate", lambda config, update: 0.125)
    return lambda out, row, base: row["lr"] == 0.125


def prompt(patch):
    shouting = Template("arithmetic", "{q}!~", answer="hash")
    patch.setitem(templates.TEMPLATES, "arithmetic", shouting)
    return lambda out, row, base: row["entropy"] > base["entropy"]


def load_problems(patch):
    original = data.load_problems
    patch.setattr(data, "load_problems", lambda *args, **kwargs: original(*args, **kwargs)[:2])
    return lambda out, row, base: (
        len({r["problem"] for r in read_jsonl(out / "samples.jsonl")}) == 2
    )


def recipes(patch):
    patch.setitem(config.RECIPES, "mine", lambda: replace(config.tiny(), recipe="mine", lr=0.5))
    assert config.parse_args(["--recipe", "mine"]).lr == 0.5
    return None


def sampler(patch):
    class Silent(TorchEngine):
        def generate(self, requests, sampling, on_finish, enough):
            return super().generate(
                requests, replace(sampling, max_new_tokens=3), on_finish, enough
            )

    def make_engine(config, path, tokenizer, device, max_tokens, *vllm_options, load_weights):
        options = {"dtype": torch.float32, "device": device, "batch": 8}
        return Silent(path, tokenizer, **options, max_tokens=max_tokens)

    patch.setattr(train, "make_engine", make_engine)
    return lambda out, row, base: row["response_len_mean"] == 3


EDITS = {
    "train.py:reward": reward,
    "drgrpo/advantage.py:group_advantage": group_advantage,
    "drgrpo/advantage.py:token_weight": token_weight,
    "kernels/linear_drgrpo.py:token_objective": token_objective,
    "train.py:learning_rate": learning_rate,
    "drgrpo/templates.py:TEMPLATES": prompt,
    "drgrpo/data.py:load_problems": load_problems,
    "drgrpo/config.py:RECIPES": recipes,
    "drgrpo/engine.py:make_engine": sampler,
}


@pytest.fixture(scope="module")
def unchanged(warm_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("forks") / "base"
    (row,) = run(small(warm_model, out, **STEP))
    return out, row


@pytest.mark.parametrize("place", EDITS)
def test_an_edit_changes_training(place, unchanged, warm_model, tmp_path, monkeypatch):
    changed = EDITS[place](monkeypatch)
    if changed:
        (row,) = run(small(warm_model, tmp_path / "fork", **STEP))
        out, before = unchanged
        assert not changed(out, before, before), "true without the edit too"
        assert changed(tmp_path / "fork", row, before)


def test_the_readme_names_these_places_and_no_others():
    table = (ROOT / "README.md").read_text().split("| to change |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([\w/]+\.py:\w+)`", table)) == set(EDITS)


def test_what_the_readme_offers_without_an_edit_changes_training(
    unchanged, warm_model, tmp_path, monkeypatch
):
    table = (ROOT / "README.md").read_text().split("| to change |")[1].split("\n\n")[0]
    offers = re.findall(r"`([\w/]+\.py:\w+)` \| or no edit: `([^`]*)`", table)
    assert [place.partition(":")[2] for place, _ in offers] == [
        *("reward", "TEMPLATES", "load_problems")
    ]
    header = "(response, *, problem, answer, finished, **columns)"
    (tmp_path / "my.py").write_text(f"def format_ok{header}: return 10")
    (tmp_path / "my_prompt.txt").write_text("{q}!~\n")
    (tmp_path / "my.jsonl").write_text('{"question": "1+1+x=3", "answer": "1"}\n')
    monkeypatch.chdir(tmp_path)
    flags = shlex.split(" ".join(flags for _, flags in offers))
    mine = config.parse_args(["--recipe", "tiny", *flags])
    names = ("reward", "template", "answer", "train_data", "problem_field")
    changes = STEP | {name: getattr(mine, name) for name in names}
    (row,) = run(small(warm_model, tmp_path / "run", **changes))
    assert row["reward/format_ok"] == 10 and row["reward_mean"] == 2 + row["reward/math"]
    assert row["no_answer_frac"] < unchanged[1]["no_answer_frac"] + 0.5
    assert {r["problem"] for r in read_jsonl(tmp_path / "run" / "samples.jsonl")} == {"1+1+x=3"}


@pytest.mark.parametrize("place", EDITS)
def test_each_place_is_defined_in_its_file(place):
    file, name = place.split(":")
    pattern = rf"^(def|class) {name}\b|^{name}\b.*="
    assert re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
