"""Pruned-model bundles: safetensors and Orbax, with their config."""
