"""Prompt templates: how a question is put to the model, where the response stops and how its answer
is marked.

`qwen_math`, `r1` and `none` are the paper's, to the letter (Sec. 3.3 shows how much a template that
does not fit the base model costs). To add one, add it to `TEMPLATES`.
"""

from dataclasses import dataclass

from drgrpo.types import UserError, check_name


@dataclass(frozen=True, slots=True)
class Template:
    """text:   the prompt with `{q}` where the question goes; None leaves the wrapping to the tokenizer's chat template.
    answer: how `drgrpo.grade.extract` finds the answer: the last "boxed", the "tag"s of r1, or
    after the one "hash".
    stop:   strings that end a response besides EOS; they stay in the response."""

    name: str
    text: str | None
    answer: str
    stop: tuple[str, ...] = ()


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "qwen_math",
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
            answer="boxed",
        ),
        Template(
            "r1",
            "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
            "The Assistant first thinks about the reasoning process in the mind and then provides the User with the "
            "answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within "
            "<answer> </answer> tags, respectively, i.e., "
            "<think> reasoning process here </think> <answer> answer here </answer>.\n"
            "User: {q}\nAssistant: <think>",
            answer="tag",
            stop=("</answer>",),
        ),
        Template("none", "{q}", answer="boxed"),
        Template("chat", None, answer="boxed"),
        Template("arithmetic", "{q}~", answer="hash"),
    )
}


def get_template(name: str) -> Template:
    """The template of that name; UserError with the nearest one if there is none."""
    check_name("template", name, TEMPLATES)
    return TEMPLATES[name]


def encode(template: Template, question: str, tokenizer) -> list[int]:
    """Token ids of the prompt, with the special tokens (a BOS, where the model has one) that vLLM
    adds to a text prompt. UserError if the template is `chat` and the tokenizer has no chat
    template."""
    if template.text is not None:
        # str.replace and not str.format: questions are full of braces, and so is \boxed{}.
        return list(tokenizer(template.text.replace("{q}", question))["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"template 'chat' needs a chat template and the tokenizer of {name!r} has none (base models rarely do); "
            f"choose another template: {', '.join(name for name, t in TEMPLATES.items() if t.text is not None)}"
        )
    messages = [{"role": "user", "content": question}]
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )
