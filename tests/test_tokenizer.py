"""The byte-level tokenizer takes any text, gives it back, and survives saving."""

import pytest
from transformers import AutoTokenizer

TEXTS = [
    "7+4+x=18~",
    "",
    "é 日本 🙂",
    "\\boxed{\\frac{1}{2}}\n\n\t",
    "a  b",
    "\x00\x7f",
    "<|im_start|>user\n",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_plain_text_is_one_token_per_byte_and_nothing_is_added(tokenizer):
    assert len(tokenizer("héllo").input_ids) == len("héllo".encode())


def test_special_tokens_are_single_ids_and_left_out_of_responses(tokenizer):
    ids = tokenizer("<|im_start|>hi<|im_end|><|endoftext|>").input_ids
    assert len(ids) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[3]).input_ids == tokenizer(TEXTS[3]).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 260)
    assert "<|im_start|>assistant" in loaded.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
