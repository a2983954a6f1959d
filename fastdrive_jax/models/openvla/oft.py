"""What OpenVLA-OFT adds (arXiv 2502.19645): the robot's state as a token, a regressing head.

Actions are not decoded: the sequence ends in a slot of zeros for each number of a chunk of actions,
all see all, and the head reads the hidden states that would have given the tokens.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from fastdrive_jax.parallel.rules import constrain

_EPS = 1e-5  # of PyTorch's LayerNorm
BLOCKS = 2  # of the head


class ProprioProjector(nn.Module):
    """The robot's state to one token.

    Attributes:
        size: D.
    """

    size: int

    @nn.compact
    def __call__(self, x: Float[Array, "B P"]) -> Float[Array, "B D"]:
        """Maps normalised states [B, P] to [B, D]."""
        x = nn.gelu(nn.Dense(self.size, name="fc1")(x), approximate=False)
        return nn.Dense(self.size, name="fc2")(x)


class ActionHead(nn.Module):
    """An MLP with residuals over the hidden states of one action, trained with an L1 loss.

    Attributes:
        size: Width within.
        action_dim: A.
    """

    size: int
    action_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T A"]:
        """Maps the A hidden states of each action, side by side, to its numbers [B, T, A]."""

        def norm(x, name):
            return nn.LayerNorm(_EPS, use_fast_variance=False, name=name)(x)

        x = nn.relu(nn.Dense(self.size, name="fc1")(norm(x, "layer_norm1")))
        x = constrain(x, "batch", "token", "embed")
        for number in range(BLOCKS):
            y = norm(x, f"blocks_{number}_norm")
            x = x + nn.relu(nn.Dense(self.size, name=f"blocks_{number}_dense")(y))
        return nn.Dense(self.action_dim, name="fc2")(norm(x, "layer_norm2"))
