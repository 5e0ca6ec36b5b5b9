"""Prompt templates: how a question becomes a prompt, where a response stops, and how its answer is
marked.

`qwen_math`, `r1` and `none` are the paper's, to the letter. Sec. 3.3 of the paper measures the cost
of a template that does not fit the base model. A new template is a new member of `_ALL`, or no
edit: `--template` takes a file and a text too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from drgrpo.types import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


AnswerRule = Literal["auto", "boxed", "tag", "hash", "gsm8k", "number", "formula"]
"""What `--answer` takes: a rule of `drgrpo.answers.extract`, or `auto` for the template's own."""


@dataclass(frozen=True, slots=True)
class Template:
    """text:   the prompt, with `{q}` where the question goes. None: the tokenizer's chat template.
    answer: the rule of `drgrpo.answers.extract`, such as "boxed".
    stop:   strings that end a response, besides EOS. They are part of the response.
    system: the system message of a chat template; empty for none."""

    name: str
    text: str | None
    answer: str
    stop: tuple[str, ...] = ()
    system: str = ""


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
OWN_RULE = "boxed"  # of a template that is not built in


def get_template(name: str, answer: str = "auto", system: str = "") -> Template:
    """The template of that name, the one in the file of that name, or the text `name` itself if it
    holds `{q}`. Their answers are boxed, unless `answer` names a rule.

    UserError for an unknown name, a text without `{q}`, and a `system` that the template lacks."""
    template = TEMPLATES.get(name) or Template(name, template_text(name), answer=OWN_RULE)
    if system and template.text is not None:
        raise UserError(
            f"--system goes with --template chat; the text of {name!r} holds its own system message"
        )
    rule = template.answer if answer == "auto" else answer
    return replace(template, answer=rule, system=system)


def template_text(name: str) -> str:
    """The text of a template that is not built in. The newline that ends a file is left out."""
    if os.path.isfile(name):
        try:
            text = Path(name).read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"the template {name} is not UTF-8: {error}; save it so") from error
        if "{q}" not in text:
            raise UserError(f"the template {name} lacks {{q}}; write {{q}} where the question goes")
        return text
    if "{q}" not in name:
        raise UserError(
            f"unknown template {name!r}; {nearest(name, TEMPLATES)}there are "
            f"{', '.join(TEMPLATES)}; or name a file, or give a text, with {{q}} where the "
            "question goes"
        )
    return name


def encode(template: Template, question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt, with the special tokens that vLLM adds to a text prompt (a BOS,
    where the model has one). UserError if `chat` meets a tokenizer without a chat template."""
    from jinja2 import TemplateError  # some chat templates refuse a system message

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
    messages = [{"role": "system", "content": template.system}] if template.system else []
    messages.append({"role": "user", "content": question})
    try:
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise UserError(f"template 'chat' fails on {len(messages)} messages: {error}") from error
    return list(chat["input_ids"])
