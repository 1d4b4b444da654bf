"""Initialisations from data: what fresh adapters begin with, after the allocation and before training."""
