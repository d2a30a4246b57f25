"""Time to first token, sparse against stock mlx-lm."""
