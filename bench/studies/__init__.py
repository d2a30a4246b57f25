"""Scripts for developers: python -m mlx_fastforward.bench.studies.NAME."""
