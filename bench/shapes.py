"""Sizes of models, from the config.json of each on the hub. Nothing is downloaded."""

from transformers import AutoConfig, PretrainedConfig

FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
MODELS = {
    "Qwen2.5-7B": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128, False),
    "Qwen2.5-1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, 128, True),
    "Llama-3.1-8B": ("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, False),
    "Llama-3.2-3B": ("llama", 128_256, 3072, 8192, 28, 24, 8, 128, True),
    "Qwen3-4B": ("qwen3", 151_936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen3-0.6B": ("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, True),
    "toy": ("qwen3", 512, 64, 128, 2, 4, 2, 16, True),
}
SHAPES = {"0.6b": "Qwen3-0.6B", "1.5b": "Qwen2.5-1.5B", "3b": "Llama-3.2-3B", "7b": "Qwen2.5-7B"}
"""What `--shape` of the benchmarks takes, and the model of that size."""


def model_config(model: str, **changes) -> PretrainedConfig:
    """The configuration of a model in MODELS, with other fields for `changes`."""
    sizes = dict(zip(FIELDS, MODELS[model], strict=True))
    return AutoConfig.for_model(**sizes | changes)
