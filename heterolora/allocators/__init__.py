"""Allocators: from gains and a budget to ranks. Pure functions of their arguments; no torch here."""
