"""Measurements that take long; each says how it was made."""
