"""Dr. GRPO (arXiv 2503.20783): group-relative policy optimization without its two biases."""
