"""Training: losses, the reconstruction decoder, state, step, loop, checkpoints."""
