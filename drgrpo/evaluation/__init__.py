"""Score a model, compare two, analyze what it wrote: all that `eval.py` needs."""
