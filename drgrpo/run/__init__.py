"""What a training run needs besides the algorithm: its folder, checkpoints, log, memory, limits."""
