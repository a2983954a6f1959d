"""A synthetic driving data set, as pictures in the nuScenes layout and as shards."""

from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.build import shards_of
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate


@dataclass(frozen=True)
class WorldArgs:
    """Generate a synthetic driving data set in the nuScenes layout, and its shards.

    Attributes:
        out: Folder for world/ and shards/.
        world: Size and content of the data set.
    """

    out: Path
    world: WorldConfig = field(default_factory=WorldConfig)


def write_world(args: WorldArgs) -> None:
    """Pictures, then shards of them."""
    root = generate(args.out / "world", args.world)
    shards_of(read_nuscenes(root), args.out / "shards", quiet=False)
