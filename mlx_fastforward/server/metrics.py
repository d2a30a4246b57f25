"""What a server did, as Prometheus reads it."""

from typing import Callable

import mlx.core as mx
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from .requests import Report

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
TOKENS = (64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


class Metrics:
    """One server's."""

    def __init__(self, waiting: Callable[[], int], deaths: Callable[[], int]):
        self.registry = registry = CollectorRegistry()
        name = "fastforward_"
        self.requests = Counter(
            f"{name}requests", "Requests", ["path", "status"], registry=registry
        )
        self.ttft = Histogram(
            f"{name}ttft_seconds",
            "Time to first token",
            ["prefill"],
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt = Histogram(
            f"{name}prompt_tokens", "Prompt tokens", buckets=TOKENS, registry=registry
        )
        self.answer = Histogram(
            f"{name}answer_tokens", "Answer tokens", buckets=TOKENS, registry=registry
        )
        self.cached = Counter(
            f"{name}cached_tokens",
            "Prompt tokens that were not read again",
            registry=registry,
        )
        self.skipped = Histogram(
            f"{name}ffn_sparsity",
            "Share of FFN FLOPs skipped",
            buckets=SHARES,
            registry=registry,
        )
        for gauge, meaning, read in (
            ("queue", "Requests that wait for the generation thread", waiting),
            ("thread_restarts", "Deaths of the generation thread", deaths),
            ("memory_bytes", "Memory that mlx holds", mx.get_active_memory),
        ):
            Gauge(name + gauge, meaning, registry=registry).set_function(read)

    def answered(self, report: Report, prompt: int, answer: int) -> None:
        """One answer, complete."""
        sparse = "sparse" if report.ffn_sparsity else "dense"
        self.ttft.labels(sparse).observe(report.ttft_s)
        self.prompt.observe(prompt)
        self.answer.observe(answer)
        self.cached.inc(report.cached_tokens)
        self.skipped.observe(report.ffn_sparsity)

    def text(self) -> bytes:
        return generate_latest(self.registry)
