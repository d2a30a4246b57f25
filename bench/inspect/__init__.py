"""What sparse prefill does inside a model."""
