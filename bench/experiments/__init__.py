"""Studies. Each is frozen with its result and its commit under `bench/results/`."""
