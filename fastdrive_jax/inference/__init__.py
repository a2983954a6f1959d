"""Prefill, decode and the driving policy."""
