"""From nuScenes as downloaded to shards of nuScenes-FG: masks, then shards, then a check.

    fastdrive data mask --nuscenes ROOT --out MASKS masker:annotations
    fastdrive data build --nuscenes ROOT --masks MASKS --out SHARDS --workers 8
    fastdrive data verify --shards SHARDS

Each goes on where it was stopped. `mask` shares its work among machines by `--part 0 4` and so on;
`build` runs on Apache Beam with `--beam`.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data_pipelines.beam import beam_runner
from data_pipelines.build import RECORDS_PER_SHARD, build_shards
from data_pipelines.image_folder import read_image_folder
from data_pipelines.maskers.annotations import AnnotationConfig, AnnotationMasker
from data_pipelines.maskers.grounded_sam import load_grounded_sam
from data_pipelines.maskers.interface import Frame, Masker
from data_pipelines.maskers.label_tables import TABLES, LabelTable, coco_table, read_table
from data_pipelines.maskers.labels import LabelMasker, read_segments
from data_pipelines.maskers.prompts import DEFAULT_PROMPTS, ClassPrompt
from data_pipelines.maskers.run import check_part, folder_frames, make_masks
from data_pipelines.maskers.sam3 import SAM3_PROMPTS, load_sam3
from data_pipelines.nuscenes.keyframes import read_keyframes
from data_pipelines.nuscenes.map_layers import MapFolder
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.shards import open_shards
from experiments.view_data import ViewArgs, view_data
from fastdrive_jax.errors import UserError

_COCO = "coco"  # the table that `segments` states


@dataclass(frozen=True)
class GroundedSamArgs:
    """Boxes by text from GroundingDINO, masks from SAM 2 or SAM (extra `masks`).

    Attributes:
        detector: Folder or hub repository of the detector.
        segmenter: Folder or hub repository of the segmenter.
        prompts: What to search for, with thresholds.
        dtype: "float32", "bfloat16" or "float16".
        device: torch device; by default the first GPU, else the CPU.
    """

    detector: str = "IDEA-Research/grounding-dino-base"
    segmenter: str = "facebook/sam2.1-hiera-large"
    prompts: tuple[ClassPrompt, ...] = DEFAULT_PROMPTS
    dtype: str = "float32"
    device: str | None = None


@dataclass(frozen=True)
class Sam3Args:
    """Masks by text from SAM 3 (extra `masks`).

    Attributes:
        checkpoint: Folder or hub repository.
        prompts: What to search for, with thresholds.
        dtype: "float32", "bfloat16" or "float16".
        device: torch device; by default the first GPU, else the CPU.
    """

    checkpoint: str = "facebook/sam3"
    prompts: tuple[ClassPrompt, ...] = SAM3_PROMPTS
    dtype: str = "float32"
    device: str | None = None


@dataclass(frozen=True)
class LabelArgs:
    """Masks from existing label maps.

    Attributes:
        labels: Folder of the label maps, named like the images.
        table: A built-in table ("coco" together with `segments`), or the path of a JSON table.
        suffix: What follows an image's name in the name of its label map.
        segments: COCO panoptic JSON file, for label maps of that kind.
    """

    labels: Path
    table: str
    suffix: str = ".png"
    segments: Path | None = None


MaskerArgs = (
    Annotated[AnnotationConfig, tyro.conf.subcommand("annotations")]
    | Annotated[GroundedSamArgs, tyro.conf.subcommand("grounded-sam")]
    | Annotated[Sam3Args, tyro.conf.subcommand("sam3")]
    | Annotated[LabelArgs, tyro.conf.subcommand("labels")]
)


@dataclass(frozen=True)
class MaskArgs:
    """Write foreground masks and class maps of images.

    Attributes:
        out: Folder for masks/, labels/ and classes.json; may be the root itself.
        nuscenes: Root of a nuScenes set, whose key frames are masked; or give `images`.
        images: Any folder of images, instead of `nuscenes`.
        version: Table folder, required if there are several.
        masker: How the masks are made.
        batch_size: Images processed at once.
        skip_bad: Maximum number of damaged images to skip; each is named.
        part: Index and count of this process among those that share the work.
    """

    out: Path
    nuscenes: Path | None = None
    images: Path | None = None
    version: str | None = None
    masker: MaskerArgs = field(default_factory=AnnotationConfig)
    batch_size: int = 8
    skip_bad: int = 0
    part: tuple[int, int] = (0, 1)

    def __post_init__(self):
        if (self.nuscenes is None) == (self.images is None):
            raise UserError("Give either --nuscenes or --images.")
        check_part(self.part)


@dataclass(frozen=True)
class BuildArgs:
    """Pack images and masks into shards.

    Attributes:
        out: New folder for the shards.
        nuscenes: Root of a nuScenes set; or give `images`.
        images: A folder of your own, see the quick start, instead of `nuscenes`.
        masks: Folder that `mask` wrote, if it is not the root.
        version: Table folder, required if there are several.
        split: Name of the single split of a set without splits.
        foreground: Class ids that count as foreground, for `images` with labels.
        records_per_shard: Maximum number of images in a shard.
        workers: Processes that write shards.
        skip_bad: Maximum number of bad samples to skip; each is named.
        beam: Write with Apache Beam (extra `beam`).
        beam_options: Beam's options, as in --beam-options="--runner=FlinkRunner --parallelism=64".
    """

    out: Path
    nuscenes: Path | None = None
    images: Path | None = None
    masks: Path | None = None
    version: str | None = None
    split: str | None = None
    foreground: tuple[int, ...] | None = None
    records_per_shard: int = RECORDS_PER_SHARD
    workers: int = 1
    skip_bad: int = 0
    beam: bool = False
    beam_options: str = ""

    def __post_init__(self):
        if (self.nuscenes is None) == (self.images is None):
            raise UserError("Give either --nuscenes or --images.")
        if self.beam_options and not self.beam:
            raise UserError("--beam-options need --beam.")
        given = {"foreground": self.foreground}
        if self.images is not None:
            given = {"masks": self.masks, "version": self.version, "split": self.split}
        for name, value in given.items():
            if value is not None:
                source = "nuscenes" if self.nuscenes else "images"
                raise UserError(f"--{name} means nothing with --{source}; leave it out.")


@dataclass(frozen=True)
class VerifyArgs:
    """Read all shards and check their checksums.

    Attributes:
        shards: Folder of the shards.
        skip_bad: Maximum number of bad samples allowed; each is named.
    """

    shards: Path
    skip_bad: int = 0


def mask(args: MaskArgs) -> None:
    """Runs a masker; see `MaskArgs`."""
    frames = folder_frames(args.images, args.out) if args.images else nuscenes_frames(args)
    masker = make_masker(args)
    mine = len(frames[args.part[0] :: args.part[1]])
    with tqdm(total=mine, desc=masker.name, unit="picture") as bar:

        def progress(done: int, total: int) -> None:
            del total
            bar.update(done - bar.n)

        report = make_masks(
            frames, masker, args.out, args.batch_size, progress, args.skip_bad, args.part
        )
    for name, reason in report.bad:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    print(
        f"{report.made} pictures masked ({report.remade} of them again), {report.kept} were there, "
        f"{len(report.bad)} left out."
    )


def nuscenes_frames(args: MaskArgs) -> list[Frame]:
    """All pictures of key frames; what the set lacks is said on stderr."""
    nuscenes = open_nuscenes(args.nuscenes, args.version)
    say(nuscenes.absent)
    frames = []
    for keyframe in read_keyframes(nuscenes):
        for view in keyframe.cameras:
            inside = Path(*Path(view.filename).parts[1:]).with_suffix("").as_posix()
            frames.append(Frame(args.nuscenes / view.filename, inside, view, keyframe))
    return frames


def make_masker(args: MaskArgs) -> Masker:
    """The masker that was asked for."""
    chosen = args.masker
    if isinstance(chosen, GroundedSamArgs):
        return load_grounded_sam(
            chosen.detector,
            chosen.segmenter,
            chosen.prompts,
            dtype=chosen.dtype,
            device=chosen.device,
        )
    if isinstance(chosen, Sam3Args):
        return load_sam3(
            chosen.checkpoint, chosen.prompts, dtype=chosen.dtype, device=chosen.device
        )
    if isinstance(chosen, LabelArgs):
        return label_masker(chosen)
    if args.nuscenes is None:
        raise UserError("Annotations belong to nuScenes; give --nuscenes or another masker.")
    return AnnotationMasker(MapFolder(args.nuscenes), chosen)


def label_masker(args: LabelArgs) -> LabelMasker:
    """The reader of label maps that was asked for."""
    segments, categories = None, None
    if args.segments is not None:
        segments, categories = read_segments(args.segments)
    return LabelMasker(args.labels, label_table(args.table, categories), args.suffix, segments)


def label_table(name: str, categories: Sequence[Mapping[str, Any]] | None = None) -> LabelTable:
    """The table of that name or in that file; `categories` are those of a COCO panoptic file.

    Raises:
        UserError: There is no such table, or it is COCO's and there are no categories.
    """
    if name == _COCO:
        if categories is None:
            raise UserError(
                f"Table {_COCO} takes its ids from a COCO panoptic JSON file; name that file with "
                "--masker.segments."
            )
        return coco_table(categories)
    if name in TABLES:
        return TABLES[name]
    if not Path(name).is_file():
        raise UserError(
            f"Table {name} is no JSON file and none of {', '.join(sorted({*TABLES, _COCO}))}; "
            "correct the name."
        )
    return read_table(Path(name))


def build(args: BuildArgs) -> None:
    """Writes shards; see `BuildArgs`."""
    if args.nuscenes is not None:
        source = read_nuscenes(args.nuscenes, args.version, args.split, args.masks, args.skip_bad)
    else:
        source = read_image_folder(args.images, foreground=args.foreground, skip_bad=args.skip_bad)
    say(source.absent)
    shards = build_shards(
        source,
        args.out,
        records_per_shard=args.records_per_shard,
        workers=args.workers,
        skip_bad=args.skip_bad,
        run=beam_runner(shlex.split(args.beam_options)) if args.beam else None,
    )
    for split in shards.samples:
        print(f"{split}: {shards.samples[split]} samples, {shards.records(split)} pictures")


def verify(args: VerifyArgs) -> None:
    """Checks shards; see `VerifyArgs`."""
    shards = open_shards(args.shards, verify=True, skip_bad=args.skip_bad)
    for split, shards_of_split in shards.lengths.items():
        print(
            f"{split}: {len(shards_of_split)} shards, {shards.records(split)} pictures are whole."
        )


def say(absent: Sequence[str]) -> None:
    """Names what a data set lacks, once."""
    for sentence in absent:
        print(f"note: {sentence}", file=sys.stderr)


@dataclass(frozen=True)
class DataArgs:
    """Turn nuScenes as downloaded into checked shards of nuScenes-FG.

    Attributes:
        command: What to do.
    """

    command: Annotated[
        Annotated[MaskArgs, tyro.conf.subcommand("mask", prefix_name=False)]
        | Annotated[BuildArgs, tyro.conf.subcommand("build", prefix_name=False)]
        | Annotated[VerifyArgs, tyro.conf.subcommand("verify", prefix_name=False)]
        | Annotated[ViewArgs, tyro.conf.subcommand("view", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


def data(args: DataArgs) -> None:
    """Calls the command that was asked for."""
    run = {MaskArgs: mask, BuildArgs: build, VerifyArgs: verify, ViewArgs: view_data}
    run[type(args.command)](args.command)
