"""Metrics, intervals, tables, pictures and the report."""
