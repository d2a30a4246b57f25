"""Measuring: TTFT (ttft), quality (quality), predictors (recall), conversions (conversion)."""
