"""What the robot policy is taught, and what it is fed while it is."""

import jax.numpy as jnp
import numpy as np
from small_openvla import small_openvla

from fastdrive_jax.models.openvla.actions import bin_centres, decode_actions, encode_actions
from fastdrive_jax.training.robot import action_targets, fed_ids


def test_what_is_fed_is_what_the_likeliest_target_would_be_fed_as():
    """Also at the ends, where the published encoder has an id that is never answered."""
    config = small_openvla()[0].config
    centres = bin_centres(config.bins)
    actions = jnp.asarray([[-1.0, 1.0, 0.0, 0.37, 0.999, -0.999, *centres[[0, 1, 100, -2, -1]]]])
    fed = np.asarray(fed_ids(config, actions))
    np.testing.assert_array_equal(fed, action_targets(config, actions, blur=0.5).argmax(-1))
    again = fed_ids(config, decode_actions(jnp.asarray(fed), config))
    np.testing.assert_array_equal(again, fed)
    published = np.asarray(encode_actions(actions, config))
    np.testing.assert_array_equal(np.flatnonzero(published[0] != fed[0]), [1])
