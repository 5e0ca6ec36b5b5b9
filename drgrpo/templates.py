"""Prompt templates: how a question becomes a prompt, where a response stops, and how its answer is
marked.

`qwen_math`, `r1` and `none` are the paper's, to the letter. Sec. 3.3 of the paper measures the cost
of a template that does not fit the base model. A new template is a new member of `_ALL`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drgrpo.types import UserError, check_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Template:
    """text:   the prompt, with `{q}` where the question goes. None: the tokenizer's chat template.
    answer: the rule of `drgrpo.grade.extract`: "boxed" (last box), "tag" (r1's) or "hash".
    stop:   strings that end a response, besides EOS. They are part of the response."""

    name: str
    text: str | None
    answer: str
    stop: tuple[str, ...] = ()


_ALL = (
    Template(
        "qwen_math",
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n"
        "{q}<|im_end|>\n"
        "<|im_start|>assistant\n",
        answer="boxed",
    ),
    Template(
        "r1",
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {q}\n"
        "Assistant: <think>",
        answer="tag",
        stop=("</answer>",),
    ),
    Template("none", "{q}", answer="boxed"),
    Template("chat", None, answer="boxed"),
    Template("arithmetic", "{q}~", answer="hash"),
)

TEMPLATES = {template.name: template for template in _ALL}


def get_template(name: str) -> Template:
    """The template of that name. UserError with the nearest name if there is none."""
    check_name("template", name, TEMPLATES)
    return TEMPLATES[name]


def encode(template: Template, question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt, with the special tokens that vLLM adds to a text prompt (a BOS,
    where the model has one). UserError if `chat` meets a tokenizer without a chat template."""
    if template.text is not None:
        # str.replace, because str.format fails on the braces of questions and of \boxed{}
        return list(tokenizer(template.text.replace("{q}", question))["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        others = [name for name, template in TEMPLATES.items() if template.text is not None]
        raise UserError(
            f"template 'chat' needs a chat template and the tokenizer of {name!r} has none (base "
            f"models rarely do); choose another template: {', '.join(others)}"
        )
    messages = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(chat["input_ids"])
