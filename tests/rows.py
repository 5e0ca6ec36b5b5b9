"""Made-up rows of responses.jsonl, for the tests that read them."""

from typing import Any


def response_row(**changes: Any) -> dict:
    """A right answer to the first problem of benchmark "b", unless `changes` say otherwise."""
    row = {"benchmark": "b", "template": "qwen_math", "temperature": 1.0, "id": 0, "sample": 0}
    row |= {"problem": "q", "answer": "1", "response": "r", "score": 1.0, "parsed": True}
    row |= {"vote": None, "tokens": 5, "finished": True}
    return row | changes
