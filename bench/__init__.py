"""Measuring: TTFT (ttft), quality (quality), and a first trained predictor (fit_predictor)."""
