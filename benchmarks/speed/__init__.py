"""Speed and memory, ours beside a peer's: ``python -m benchmarks.speed`` (see docs/performance.md)."""
