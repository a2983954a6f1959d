"""The driving vocabulary: commands, speeds and trajectories as token ids and back.

A trajectory is written as its steps, x then y, each step's displacement rounded to a bin; absolute
positions would need many more bins for the same resolution.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.errors import UserError

BOS, VISION_START, VISION_END, PLAN = range(4)
COMMANDS = 3


@dataclass(frozen=True)
class DrivingVocabulary:
    """Ids: 4 marks, 3 commands, then speeds, then displacements.

    Attributes:
        speed_bins: Speed ids.
        speed_step: Metres per second of one speed bin.
        displacement_bins: Displacement ids, shared by x and y.
        displacement_low: Metres of the lowest displacement.
        displacement_step: Metres of one displacement bin.
        steps: T, waypoints of a trajectory.
    """

    speed_bins: int = 64
    speed_step: float = 0.25
    displacement_bins: int = 128
    displacement_low: float = -5.0
    displacement_step: float = 0.1
    steps: int = 6

    @property
    def first_command(self) -> int:
        """Id of command 0."""
        return PLAN + 1

    @property
    def first_speed(self) -> int:
        """Id of the lowest speed."""
        return self.first_command + COMMANDS

    @property
    def first_displacement(self) -> int:
        """Id of the lowest displacement."""
        return self.first_speed + self.speed_bins

    @property
    def size(self) -> int:
        """Ids in use."""
        return self.first_displacement + self.displacement_bins

    @property
    def plan_length(self) -> int:
        """Tokens of a trajectory, 2 T."""
        return 2 * self.steps

    def prompt(self, speed: Float[Array, " B"], command: Int[Array, " B"]) -> Int[Array, "B 3"]:
        """Token ids [B, 3] that follow the picture: command, speed in m/s, start of the plan."""
        bins = jnp.clip(jnp.round(speed / self.speed_step), 0, self.speed_bins - 1)
        ids = [
            self.first_command + command.astype(jnp.int32),
            self.first_speed + bins.astype(jnp.int32),
            jnp.full(command.shape, PLAN, jnp.int32),
        ]
        return jnp.stack(ids, axis=-1)

    def encode(self, future: Float[Array, "B T 2"]) -> Int[Array, "B 2T"]:
        """Token ids [B, 2 T] of waypoints in metres, x forward and y left of the ego vehicle.

        Each bin is chosen against the position decoded so far, so rounding does not add up.

        Raises:
            UserError: There are more or fewer waypoints than a plan has.
        """
        if future.shape[1:] != (self.steps, 2):
            raise UserError(
                f"Waypoints of shape {future.shape} must be [B, {self.steps}, 2]: a plan has "
                f"{self.steps}."
            )
        ids, at = [], jnp.zeros((future.shape[0], 2))
        for step in range(self.steps):
            bins = (future[:, step] - at - self.displacement_low) / self.displacement_step
            bins = jnp.clip(jnp.round(bins), 0, self.displacement_bins - 1).astype(jnp.int32)
            at = at + self.displacement_low + bins * self.displacement_step
            ids.append(self.first_displacement + bins)
        return jnp.stack(ids, axis=1).reshape(future.shape[0], -1)

    def decode(self, ids: Int[Array, "B 2T"]) -> Float[Array, "B T 2"]:
        """Waypoints [B, T, 2] in metres of token ids; the inverse of `encode` up to rounding."""
        bins = ids.reshape(ids.shape[0], self.steps, 2) - self.first_displacement
        moves = self.displacement_low + bins * self.displacement_step
        return jnp.cumsum(moves.astype(jnp.float32), axis=1)
