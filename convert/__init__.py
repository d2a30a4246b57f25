"""Trained checkpoints of other frameworks become adapters here; nothing is converted yet."""
