"""Settings of every test."""

import jax

# On GPUs float32 products are rounded to TF32 unless this is asked for; CPUs know no difference.
jax.config.update("jax_default_matmul_precision", "highest")
