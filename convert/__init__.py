"""Trained PyTorch checkpoints -> predictors: files (reading), naming (what is what), conversion."""
