"""heterolora: where low-rank fine-tuning budgets are decided."""

__version__ = "0.1.0"
