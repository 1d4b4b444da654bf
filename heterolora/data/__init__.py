"""Data: sources of labelled text, splits, tokens and batches."""
