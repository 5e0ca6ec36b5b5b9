"""The `tiny` recipe: its task, its tokenizer and its warmed-up model."""
