"""mlx-lm's server over models that prefill sparsely."""
