"""Trained PyTorch checkpoints -> adapters: files (reading), naming (what is what), conversion."""
