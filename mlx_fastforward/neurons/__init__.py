"""Which neurons a block keeps, and what is added back for the others."""
