"""What this proves: every template is the paper's, to the letter, and is tokenized as vLLM
tokenizes the same text."""

from typing import get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drgrpo.answers import RULES
from drgrpo.templates import TEMPLATES, AnswerRule, encode, get_template
from drgrpo.types import UserError

# braces, a format field and the placeholder itself
QUESTION = "Solve $\\frac{x}{2} = {q}$ for {x}.\n"


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with two special tokens, which puts a BOS first as Llama's does."""
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
    "qwen_math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        f"\\boxed{{}}.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>.\n"
        f"User: {QUESTION}\nAssistant: <think>"
    ),
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
    im_starts = ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert im_starts == PROMPTS[name].count("<|im_start|>"), "special tokens are one token each"


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_chat_is_the_tokenizers_own_template_with_one_bos():
    tokenizer = byte_tokenizer(CHAT)
    ids = encode(get_template("chat"), QUESTION, tokenizer)
    prompt = f"<|bos|><|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == prompt
    assert all(isinstance(id, int) for id in ids)


def test_chat_without_a_chat_template_names_the_way_out():
    message = r"'chat'.*choose another template: qwen_math, r1, none, arithmetic$"
    with pytest.raises(UserError, match=message):
        encode(get_template("chat"), "1+1", byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen-math", "'qwen-math'; did you mean 'qwen_math'"),
        ("no", "'no'; did you mean 'none'"),
        ("R1", "'R1'; did you mean 'r1'"),
        ("arithmetics", "'arithmetics'; did you mean 'arithmetic'"),
        ("zzz", "'zzz'; there are qwen_math, r1, none, chat, arithmetic"),
    ],
)
def test_an_unknown_template_names_the_nearest_and_all(name, message):
    with pytest.raises(UserError, match=message):
        get_template(name)


def test_chat_takes_a_system_message():
    tokenizer = byte_tokenizer(CHAT)
    ids = encode(get_template("chat", system="Be brief."), QUESTION, tokenizer)
    messages = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
    assert tokenizer.decode(ids) == f"<|bos|>{messages}<|im_start|>assistant\n"


def test_a_chat_template_that_refuses_a_system_message_is_named():
    refusing = byte_tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(UserError, match="'chat' fails on 2 messages: no system here"):
        encode(get_template("chat", system="Be brief."), "1+1", refusing)


@pytest.mark.parametrize("name", ["qwen_math", "Q: {q}"])
def test_a_text_takes_no_system_message(name):
    with pytest.raises(UserError, match="--system goes with --template chat"):
        get_template(name, system="Be brief.")


def test_a_text_with_q_is_a_template():
    tokenizer = byte_tokenizer()
    ids = encode(get_template("Q: {q} {x}\nA:"), QUESTION, tokenizer)
    assert tokenizer.decode(ids) == f"<|bos|>Q: {QUESTION} {{x}}\nA:"


@pytest.mark.parametrize(("end", "kept"), [("", ""), ("\n", ""), ("\n\n", "\n")])
def test_a_file_is_a_template_without_its_last_newline(tmp_path, end, kept):
    path = tmp_path / "prompt.txt"
    path.write_text("Q: {q}" + end)
    template, tokenizer = get_template(str(path)), byte_tokenizer()
    assert tokenizer.decode(encode(template, "1+1", tokenizer)) == f"<|bos|>Q: 1+1{kept}"
    assert (template.answer, template.name, template.stop) == ("boxed", str(path), ())


def test_a_text_or_file_without_q_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"give a text, with \{q\} where the question goes"):
        get_template("Question: Answer:")
    path = tmp_path / "prompt.txt"
    path.write_text("Q: {question}")
    with pytest.raises(UserError, match=r"prompt\.txt lacks \{q\}; write \{q\} where"):
        get_template(str(path))


@pytest.mark.parametrize("name", ["r1", "chat", "Q: {q}"])
def test_an_answer_rule_replaces_the_templates_own(name):
    assert get_template(name, "number").answer == "number"
    assert get_template(name, "number").stop == get_template(name).stop
    assert get_template(name, "auto") == get_template(name)


def test_the_command_line_takes_every_rule():
    assert get_args(AnswerRule) == ("auto", *RULES)


def test_answer_and_stop_are_where_the_prompt_asks_for_them():
    assert {name: (t.answer, t.stop) for name, t in TEMPLATES.items()} == {
        "qwen_math": ("boxed", ()),
        "r1": ("tag", ("</answer>",)),
        "none": ("boxed", ()),
        "chat": ("boxed", ()),
        "arithmetic": ("hash", ()),
    }


def test_a_template_file_that_is_not_utf_8_is_one_line(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 {q}")
    with pytest.raises(UserError, match=r"prompt.txt is not UTF-8: .* save it so"):
        get_template(str(tmp_path / "prompt.txt"))
