"""What mlx-lm's models are made of: FFNs, projections, attention, caches."""
