#!/bin/bash
# A small instruction model on GSM8K, on one GPU, with a reward for its form besides the answer.
#     bash examples/one_gpu.sh        from the repository's root; the same command resumes
set -euo pipefail

torchrun --standalone --nproc-per-node=1 train.py --recipe oat_zero_1_5b \
    --model Qwen/Qwen2.5-0.5B-Instruct --train-data gsm8k --eval-data math500 \
    --reward "math + 0.1*examples/format_reward.py:one_box" \
    --prompts-per-step 64 --group-size 8 --minibatches 4 --max-new-tokens 512 \
    --steps 100 --eval-every 20 --out runs/one_gpu "$@"
