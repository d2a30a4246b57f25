"""Measuring: speed, answers, what happens inside, and studies for developers."""
