import dataclasses
import enum
import json
from pathlib import Path

import pytest

from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.training.run_config import claim_run_folder, differences


class Kind(enum.Enum):
    FAST = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    data: Path = Path("a/b")
    kind: Kind = Kind.FAST
    limit: int | None = None
    quiet: bool = False


def test_differences_name_the_field_and_both_values():
    old, new = to_plain(Outer()), to_plain(Outer(Inner((1, 3), 0.2), quiet=True))
    new["extra"] = 1
    assert differences(old, new, ignore=["quiet"]) == [
        "extra was absent and is now 1",
        "inner.rate was 0.1 and is now 0.2",
        "inner.sizes was [1, 2] and is now [1, 3]",
    ]
    assert differences(old, new, ignore=["quiet", "inner", "extra"]) == []


def test_a_folder_belongs_to_one_config(tmp_path):
    claim_run_folder(tmp_path / "run", Outer())
    claim_run_folder(tmp_path / "run", Outer())
    with pytest.raises(UserError, match=r"limit was null and is now 5"):
        claim_run_folder(tmp_path / "run", Outer(limit=5))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_damaged_config_and_checkpoints_without_config_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        claim_run_folder(tmp_path, Outer())
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        claim_run_folder(tmp_path, Outer())


def test_a_field_that_was_added_later_counts_as_its_default(tmp_path):
    claim_run_folder(tmp_path / "run", Outer())
    path = tmp_path / "run/config.json"
    stored = json.loads(path.read_text())
    del stored["kind"], stored["inner"]["sizes"], stored["limit"]
    path.write_text(json.dumps(stored))
    claim_run_folder(tmp_path / "run", Outer())
    with pytest.raises(UserError, match=r"\(inner\.sizes was \[1, 2\] and is now \[3\]\)"):
        claim_run_folder(tmp_path / "run", Outer(Inner((3,))))
    claim_run_folder(tmp_path / "named", {"run": Outer()})
    (tmp_path / "named/config.json").write_text(json.dumps({"run": stored}))
    claim_run_folder(tmp_path / "named", {"run": Outer()})
    with pytest.raises(UserError, match=r"\(run\.inner\.sizes was"):
        claim_run_folder(tmp_path / "named", {"run": Outer(Inner((3,)))})
    stored["dropped"] = 1
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"\(dropped was 1 and is now absent\)"):
        claim_run_folder(tmp_path / "run", Outer())
