"""TRL's GRPOTrainer with the fused head: a model of 0.1 M parameters learns to write digits.

    pip install trl==1.16.0
    python examples/trl_grpo.py        # on a CPU in under a minute; --out FOLDER, --steps 30

The five lines are marked. With a pretrained model they are the same.
"""

import argparse

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from drgrpo.kernels.trl import DrGRPOTrainer  # 1: in the place of trl.GRPOTrainer
from drgrpo.tiny.tokenizer import byte_tokenizer


def digits(completions: list[str], **_) -> list[float]:
    """The share of a response that is digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def random_model(vocabulary: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, initializer_range=0.08)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **shape, **heads))


def main(out: str, steps: int) -> None:
    cpu = dict(use_cpu=True, bf16=False) if not torch.cuda.is_available() else {}
    args = GRPOConfig(
        loss_type="dr_grpo",  # 2: a sum over tokens, divided by a constant
        scale_rewards="none",  # 3: advantages are not divided by the standard deviation
        **dict(output_dir=out, max_steps=steps, learning_rate=3e-3, logging_steps=5),
        **dict(num_generations=8, per_device_train_batch_size=64, max_completion_length=16),
        **dict(save_strategy="no", report_to="none", **cpu),
    )
    tokenizer = byte_tokenizer()
    prompts = Dataset.from_dict({"prompt": [f"{i}:" for i in range(64)]})
    model = random_model(len(tokenizer))
    trainer = DrGRPOTrainer(model, digits, args, prompts, processing_class=tokenizer)  # 4
    trainer.train()  # 5
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"reward: {rewards[0]:.2f} in the first steps, {rewards[-1]:.2f} in the last")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="runs/trl_grpo")
    parser.add_argument("--steps", type=int, default=30)
    main(**vars(parser.parse_args()))
