"""Fitting predictors on the user's machine: data, capture, predictor, compensator, importance, run."""
