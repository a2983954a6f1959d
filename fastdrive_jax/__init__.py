"""FastDrive-JAX: visual-token pruning for vision-language-action models."""

__version__ = "0.1.0"
