import enum
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from experiments.configs.pruner import PRUNER_RUNS, TINY, PrunerRun
from fastdrive_jax.configs import check_least, from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    inner: Inner | None = None
    name: str | None = None
    ratio: float = 0.5


class Kind(enum.Enum):
    FAST = 1


def test_paths_enums_and_numpy_scalars_have_a_plain_form():
    given = {"at": Path("a") / "b", "kind": Kind.FAST, "rate": np.float32(0.5), "of": (Inner(),)}
    plain = {"at": "a/b", "kind": "FAST", "rate": 0.5, "of": [{"sizes": [1, 2]}]}
    assert to_plain(given) == plain == json.loads(json.dumps(plain))
    with pytest.raises(ValueError, match="function"):
        to_plain({"f": test_paths_enums_and_numpy_scalars_have_a_plain_form})


@pytest.mark.parametrize(
    "config",
    [
        DrivingConfig(),
        replace(DrivingConfig(), cameras=("CAM_BACK", "CAM_FRONT"), image_size=(56, 84)),
        *PRUNER_RUNS.values(),
        Outer(),
        Outer(inner=Inner((3,)), name="x"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_config_comes_back_from_a_json_file(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_plain(config)))
    back = from_plain(type(config), json.loads(path.read_text()))
    assert back == config
    assert hash(back) == hash(config)  # tuples again, not lists: static arguments need it


def test_plain_is_what_json_gives_back():
    assert to_plain(Outer(inner=Inner((3, 4)))) == {
        "inner": {"sizes": [3, 4]},
        "name": None,
        "ratio": 0.5,
    }


def test_unknown_and_missing_fields_are_refused_by_name():
    plain = to_plain(DrivingConfig())
    with pytest.raises(UserError, match=r"DrivingConfig.*colour"):
        from_plain(DrivingConfig, plain | {"colour": 1})
    plain.pop("cameras")
    with pytest.raises(UserError, match=r"DrivingConfig.*cameras"):
        from_plain(DrivingConfig, plain)


def test_a_fault_deep_inside_is_named_with_its_class():
    plain = to_plain(TINY)
    plain["recon"]["decoder"]["widht"] = 3
    with pytest.raises(UserError, match=r"DecoderConfig.*widht"):
        from_plain(PrunerRun, plain)
    plain = to_plain(TINY)
    plain["recon"] = [1, 2]
    with pytest.raises(UserError, match="ReconConfig"):
        from_plain(PrunerRun, plain)


def test_values_that_a_class_refuses_are_refused():
    plain = to_plain(TINY)
    plain["recon"]["keep_range"] = [0.9, 0.1]
    with pytest.raises(UserError, match="keep_range"):
        from_plain(PrunerRun, plain)


def test_what_is_below_its_least_is_named():
    @dataclass(frozen=True)
    class Asked:
        rounds: int = 1
        share: float | None = None

        def __post_init__(self):
            check_least(self, rounds=1, share=0.5)

    assert Asked(2, 0.5) == Asked(rounds=2, share=0.5)
    with pytest.raises(UserError, match=r"^rounds=0 must be at least 1\.$"):
        Asked(0)
    with pytest.raises(UserError, match=r"^share=0\.4 must be at least 0\.5\.$"):
        Asked(share=0.4)
