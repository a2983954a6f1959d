"""Driving data: sources, shards and loaders."""
