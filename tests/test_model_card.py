"""The card of a trained model says where it comes from and what it scores, in the form that the hub
reads."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from drgrpo.config import RECIPES
from drgrpo.run import folder, model_card
from drgrpo.run.files import append_jsonl

MACHINE = {"argv": ["train.py", "--recipe", "oat_zero_7b", "--lr", "2e-6", "--system", "a b"]}
MACHINE |= {"commit": "abc1234-dirty", "gpu": None, "torch": "2.13.0"}


def evaluation(step: int, accuracy: float, benchmark: str = "math500") -> dict:
    row = {"step": step, "benchmark": benchmark, "accuracy": accuracy, "samples": 1}
    row |= {"interval": [accuracy - 0.04, accuracy + 0.04], "temperature": 0.0}
    return row | {"len_correct": 600.0, "len_incorrect": None, "truncated_frac": 0.01}


def card_of(tmp_path, recipe="oat_zero_7b", library="transformers", evals=(), **settings):
    config = replace(RECIPES[recipe](), out=str(tmp_path / "my-run"), **settings)
    folder.open_run(config, 0, MACHINE)
    append_jsonl(config.folder / "eval.jsonl", evals)
    model_card.write(config, 32, tmp_path, library)
    return ModelCard.load(tmp_path / "README.md")


def test_the_hub_reads_base_data_and_scores(tmp_path, group_of_one):
    evals = [evaluation(0, 0.5), evaluation(32, 0.71234), evaluation(32, 0.25, "aime24")]
    evals.append(evaluation(32, 0.5, "mine.jsonl"))
    card = card_of(tmp_path, evals=evals)
    data = card.data
    assert (data.base_model, data.library_name) == ("Qwen/Qwen2.5-Math-7B", "transformers")
    assert data.datasets == "rasbt/math_full_minus_math500" and "dr-grpo" in data.tags
    assert {r.metric_name for r in data.eval_results} == {"accuracy, greedy"}
    results = [(r.dataset_name, r.dataset_type, r.metric_value) for r in data.eval_results]
    assert results == [
        ("math500", "HuggingFaceH4/MATH-500", 0.7123),
        ("aime24", "HuggingFaceH4/aime_2024", 0.25),
        ("mine.jsonl", "mine.jsonl", 0.5),
    ]


def test_a_person_reads_scores_recipe_command_and_commit(tmp_path, group_of_one):
    evals = [evaluation(0, 0.5), evaluation(32, 0.71)]
    text = card_of(tmp_path, evals=evals, lr=2e-6).text
    for line in (
        "# my-run",
        "| math500 | greedy | before | 0.500 | 0.460 to 0.540 | 600.0 | - | 1.0% |",
        "| math500 | greedy | step 32 | 0.710 | 0.670 to 0.750 | 600.0 | - | 1.0% |",
        "Recipe `oat_zero_7b`, with these changes:",
        "| lr | 2e-06 |",
        "python train.py --recipe oat_zero_7b --lr 2e-6 --system 'a b'",
        "The command, on 1 process:",
        "| commit | abc1234-dirty |",
        "| reward | math |",
        "## Limits",
    ):
        assert line in text.splitlines(), line
    assert "gpu" not in text and "warmup_steps" not in text


def test_what_is_not_on_the_hub_gets_no_hub_name(tmp_path, group_of_one):
    (tmp_path / "local" / "model").mkdir(parents=True)
    for model in ("tiny", str(tmp_path / "local" / "model")):
        card = card_of(tmp_path, recipe="tiny", model=model)
        assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()
        assert "There was no evaluation." in card.text
        assert (", unchanged." in card.text) == (model == "tiny")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("math_12k", "rasbt/math_full_minus_math500"),
        ("ann/data:train", "ann/data"),
        ("asdiv[:25%]", "EleutherAI/asdiv"),
        ("arithmetic", None),
        ("./data/set", None),
        ("/data/set", None),
        ("my.jsonl", None),
        ("drgrpo/run", None),
    ],
)
def test_the_hubs_name_of_a_source(source, name):
    """The last one is a folder here."""
    assert model_card.dataset(source) == name


def test_the_base_of_a_model_that_the_trainer_taught_first(tmp_path, group_of_one):
    card = card_of(tmp_path, "asdiv_smol", evals=[evaluation(3, 0.5, "asdiv_formulas[75%:]")])
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.datasets == "EleutherAI/asdiv"
    assert card.data.eval_results[0].dataset_type == "EleutherAI/asdiv"
    assert "SmolLM2-135M-Instruct with a supervised phase on formulas after 32 steps" in card.text


def test_an_adapters_card_says_that_it_needs_the_base_model(tmp_path, group_of_one):
    card = card_of(tmp_path, library="peft", lora_rank=8)
    assert card.data.library_name == "peft" and card.data.base_model == "Qwen/Qwen2.5-Math-7B"
    assert "It needs the base model." in card.text


def test_a_value_cannot_break_its_cell():
    assert model_card.cell("a|b\n<script>") == r"a\|b &lt;script>"


def test_texts_of_the_user_cannot_break_the_table(tmp_path, group_of_one):
    fields = {"train_data": "a|b", "eval_data": "c|d", "reward": "e|f:g", "template": "{q}\n|"}
    text = card_of(tmp_path, **fields).text
    for name, value in (
        ("training data", r"a\|b"),
        ("evaluation data", r"c\|d"),
        ("reward", r"e\|f:g"),
        ("prompt template, answer rule", r"{q} \|, auto"),
    ):
        assert f"| {name} | {value} |" in text.splitlines()


def test_the_run_whose_start_was_recorded_last_is_the_one(tmp_path, group_of_one):
    card_of(tmp_path)
    path = tmp_path / "my-run" / "run.json"
    starts = json.loads(path.read_text())
    path.write_text(json.dumps([starts[0] | {"commit": "x"}, starts[0] | {"resumed_step": 3}]))
    model_card.write(
        replace(RECIPES["tiny"](), out=str(tmp_path / "my-run")), 1, tmp_path, "transformers"
    )
    text = (tmp_path / "README.md").read_text()
    assert "| commit | abc1234-dirty |" in text and "resumed_step" not in text
