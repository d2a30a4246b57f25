"""The file of trained weights: reading, writing, finding and sharing it."""
