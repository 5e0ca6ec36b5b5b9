"""What this proves: every template is the paper's, to the letter, and is tokenized as vLLM
tokenizes the same text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drgrpo.templates import TEMPLATES, encode, get_template
from drgrpo.types import UserError

QUESTION = (
    "Solve $\\frac{x}{2} = {q}$ for {x}.\n"  # braces, a format field and the placeholder itself
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with two special tokens, that puts a BOS first as Llama's does."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|im_start|>", "<|im_end|>"])
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", chat_template=chat_template
    )


PROMPTS = {
    "qwen_math": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n",
    "r1": "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process "
    "is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>.\nUser: "
    + QUESTION
    + "\nAssistant: <think>",
    "none": QUESTION,
    "arithmetic": QUESTION + "~",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_is_the_papers(name):
    tokenizer = byte_tokenizer()
    ids = encode(get_template(name), QUESTION, tokenizer)
    assert tokenizer.decode(ids) == "<|bos|>" + PROMPTS[name]
    assert ids == tokenizer(PROMPTS[name]).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_special_tokens_in_a_template_are_one_token_each():
    tokenizer = byte_tokenizer()
    ids = encode(get_template("qwen_math"), "1+1", tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_chat_is_the_tokenizers_own_template_with_one_bos():
    chat = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_tokenizer(chat)
    ids = encode(get_template("chat"), QUESTION, tokenizer)
    assert (
        tokenizer.decode(ids)
        == f"<|bos|><|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert all(isinstance(id, int) for id in ids)


def test_chat_without_a_chat_template_names_the_way_out():
    with pytest.raises(
        UserError, match=r"no.*choose another template: qwen_math, r1, none, arithmetic"
    ):
        encode(get_template("chat"), "1+1", byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "near"),
    [("qwen-math", "qwen_math"), ("no", "none"), ("R1", "r1"), ("arithmetics", "arithmetic")],
)
def test_an_unknown_template_suggests_the_nearest(name, near):
    with pytest.raises(UserError, match=f"{name!r}; did you mean {near!r}"):
        get_template(name)


def test_an_unknown_template_lists_what_there_is():
    with pytest.raises(UserError, match=", ".join(TEMPLATES)):
        get_template("zzz")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen_math", "boxed"),
        ("r1", "tag"),
        ("none", "boxed"),
        ("chat", "boxed"),
        ("arithmetic", "hash"),
    ],
)
def test_the_answer_is_where_the_prompt_asks_for_it(name, answer):
    assert TEMPLATES[name].answer == answer


def test_only_r1_has_a_stop_string():
    assert {name: template.stop for name, template in TEMPLATES.items() if template.stop} == {
        "r1": ("</answer>",)
    }
