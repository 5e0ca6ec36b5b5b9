"""The byte-level tokenizer takes any text, gives it back, and survives saving."""

import pytest
from transformers import AutoTokenizer

TEXTS = ["7+4+x=18~", "", "é 日本 🙂", "\\boxed{\\frac{1}{2}}\n\n\t", "a  b", "\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_round_trips_in_one_token_per_byte(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())


def test_special_tokens_are_single_ids_and_left_out_of_responses(tokenizer):
    text = "<|im_start|>hi<|im_end|><|endoftext|>"
    ids = tokenizer(text).input_ids
    assert len(ids) == 5
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[3]).input_ids == tokenizer(TEXTS[3]).input_ids
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 260)
    chat = [{"role": "user", "content": "x"}]
    prompt = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
