"""Measuring: TTFT (ttft), answers (evaluation), predictors (recall), conversions (conversion)."""
