"""A few hundred allocations on one backbone, each trained briefly under the same settings."""
