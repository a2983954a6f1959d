"""Answers of a Qwen2.5-VL checkpoint to pictures and prompts.

    fastdrive answer --checkpoint DIR --images front.jpg --prompt "What is ahead?"
    fastdrive answer --checkpoint DIR --requests requests.jsonl --out answers.jsonl --batch-size 8
    fastdrive answer --checkpoint DIR --images front.jpg --prompt "What is ahead?" --method divprune

DIR is a folder in the Hugging Face layout. A line of the requests is
{"prompt": "...", "images": ["a.jpg"]}; marks <image> in a prompt say where its pictures stand,
without any they come first. Paths are seen from the file. Answers are appended batch by batch, and
the same command goes on behind the last.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.drives import NEED_DATA, any_method, own_file_sum
from experiments.trained_pruner import read_trained
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest
from fastdrive_jax.export.manifest import file_sum
from fastdrive_jax.inference.answering import answer_pruned, check_single_prompts
from fastdrive_jax.inference.sampling import SamplingConfig, answer_batch, read_sampling
from fastdrive_jax.models.attention import attention_kernel
from fastdrive_jax.models.qwen2_5_vl.checkpoint import checkpoint_digest, load
from fastdrive_jax.models.qwen2_5_vl.impromptu import BEGIN, parse_answer
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.processor import Processor, read_processor
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch, Sample, collate, visual_tokens
from fastdrive_jax.parallel.mesh import make_mesh, shard_where_it_divides
from fastdrive_jax.pruning import builds_on_recon, make_pruner
from fastdrive_jax.pruning.mistakes import check_kept
from fastdrive_jax.pruning.select import num_keep

LENGTH_STEP = 128  # prompts are filled up to a multiple, so that few programs are compiled


@dataclass(frozen=True)
class AnswerArgs:
    """Answer prompts about images with a Qwen2.5-VL checkpoint.

    Attributes:
        checkpoint: Folder with config.json, safetensors, tokenizer, chat template and
            preprocessor_config.json.
        prompt: One prompt.
        images: Images of the prompt.
        requests: A file of JSON lines, instead of `prompt` and `images`.
        out: File of JSON lines for the answers; required with `requests`.
        batch_size: Requests answered at once.
        max_new_tokens: Maximum number of answer tokens.
        temperature: 0 is greedy; None uses the checkpoint's generation settings.
        repetition_penalty: None uses the checkpoint's.
        max_pixels: Overrides the checkpoint's value.
        method: Pruning method; by default none, or reconpruner if `pruner` is given.
        pruner: Exported ReconPruner (`train-pruner`'s export/) trained on this checkpoint's tokens.
        keep_ratio: Share kept of the visual tokens of all images of a request together, in (0, 1].
        dtype: Dtype of weights and arithmetic.
        data: Groups of devices that split the batch, each with all weights.
        fsdp: Devices of a group that shard batch and weights.
        tensor: Devices that share each layer.
        seed: Sampling seed, used if the temperature is above 0.
    """

    checkpoint: Path
    prompt: str | None = None
    images: tuple[Path, ...] = ()
    requests: Path | None = None
    out: Path | None = None
    batch_size: int = 1
    max_new_tokens: int = 256
    temperature: float | None = None
    repetition_penalty: float | None = None
    max_pixels: int | None = None
    method: str | None = None
    pruner: Path | None = None
    keep_ratio: float = 0.25
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    seed: int = 0

    def __post_init__(self):
        if (self.prompt is None) == (self.requests is None):
            raise UserError("Give either --prompt, with --images if it has any, or --requests.")
        if self.requests is not None and self.images:
            raise UserError("With --requests the pictures are named in its lines, not by --images.")
        if self.requests is not None and self.out is None:
            raise UserError("Say with --out where the answers to --requests go.")
        num_keep(1000, self.keep_ratio)
        if self.pruned is not None and builds_on_recon(self.pruned) != (self.pruner is not None):
            raise UserError(
                f"{self.pruned} is built on a trained ReconPruner; name its folder with --pruner."
                if self.pruner is None
                else f"{self.pruned} takes no trained ReconPruner; leave --pruner out."
            )
        if self.pruned in NEED_DATA:
            raise UserError(
                f"{self.pruned} prunes by {NEED_DATA[self.pruned]}, which a prompt does not have."
            )
        if self.pruned is not None:
            check_single_prompts(any_method(self.pruned))
        groups = max(self.data, 1) * max(self.fsdp, 1)
        if self.batch_size < 1 or self.batch_size % groups:
            raise UserError(
                f"batch_size={self.batch_size} must be a positive multiple of data x fsdp = "
                f"{groups}."
            )

    @property
    def pruned(self) -> str | None:
        """The method, if tokens are pruned."""
        return self.method or ("reconpruner" if self.pruner is not None else None)

    @property
    def said(self) -> dict[str, Any]:
        """What each line of the answers says of the pruning."""
        if self.pruned is None:
            return {}
        return {"method": self.pruned, "keep_ratio": self.keep_ratio}

    def digest(self, sampling: SamplingConfig) -> str:
        """Changes with all that an answer depends on besides the request."""
        bundle, own, draws = None, (), sampling.temperature > 0
        if self.pruner is not None:
            manifest.load(self.pruner)
            bundle = file_sum(self.pruner / manifest.NAME)
        if self.pruned is not None:
            own, draws = own_file_sum(self.pruned), draws or "key" in any_method(self.pruned).needs
        drawn = (self.seed, self.batch_size) if draws else None  # a batch is drawn together
        given = self.said, bundle, own, sampling, self.max_pixels, self.dtype, drawn
        known = f"{checkpoint_digest(self.checkpoint)} {given}"
        return hashlib.sha256(known.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """A prompt and the paths of its pictures."""

    prompt: str
    images: tuple[Path, ...]


def answer(args: AnswerArgs) -> list[dict[str, Any]]:
    """Answers all requests, prints or writes each answer and returns the new ones."""
    requests = [Request(args.prompt or "", args.images)]
    if args.requests is not None:
        requests = read_requests(args.requests)
    processor = read_processor(args.checkpoint, max_pixels=args.max_pixels)
    sampling = read_sampling(
        args.checkpoint,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
    )
    settings = args.digest(sampling)
    done = 0 if args.out is None else len(read_answers(args.out, requests, settings))
    mesh = make_mesh(args.data, args.fsdp, args.tensor)
    dtype = jnp.dtype(args.dtype)
    kernel = attention_kernel(dtype, processor.config.text.head_dim)
    print(f"attention: {kernel}; {args.dtype}; mesh {dict(mesh.shape)}; {sampling}", flush=True)
    found = []
    if done == len(requests):
        return found
    config, params = load(args.checkpoint, mesh, dtype, progress=True)
    ask = _asker(args, config, params, sampling)
    for start in range(done, len(requests), args.batch_size):
        asked = requests[start : start + args.batch_size]
        samples = [read_sample(processor, request) for request in asked]
        # A last batch that is not full repeats a sample: one program, and it divides on the mesh.
        filled = samples + samples[-1:] * (args.batch_size - len(samples))
        batch = shard_where_it_divides(padded(filled, processor), mesh)
        key = jax.random.fold_in(jax.random.key(args.seed), start)
        with jax.set_mesh(mesh):
            ids, lengths = ask(filled, batch, key)
        answers = zip(asked, samples, np.asarray(ids), np.asarray(lengths), strict=False)
        more = args.said | {"settings": settings}
        new = [describe(processor, *one) | more for one in answers]
        found += new
        for one in new:
            print(one["answer"], flush=True)
        if args.out is not None:
            append(args.out, new)
    return found


def _asker(args: AnswerArgs, config, params, sampling: SamplingConfig) -> Callable:
    """`(samples, batch, key)` to ids and lengths, each shape compiled once."""
    model = QwenVL(config, jnp.dtype(args.dtype))
    whole = jax.jit(answer_batch, static_argnums=(0, 4))

    def unpruned(samples, batch, key):
        return whole(model, {"params": params}, batch, key, sampling)

    if args.pruned is None:
        return unpruned
    if args.pruner is None:
        pruner, weights = make_pruner(args.pruned), None
    else:
        given = args.pruned, args.pruner, args.checkpoint, config, args.dtype
        pruner, weights = read_trained(*given)
    run = jax.jit(answer_pruned, static_argnums=(0, 1, 2, 3, 4))

    def pruned(samples, batch, key):
        grids = {grid for one in samples for grid in one.grids}
        if not grids:
            return unpruned(samples, batch, key)
        counts = {len(one.grids) for one in samples}
        if len(grids) > 1 or len(counts) > 1:
            raise UserError(
                "Pruning takes as many pictures in each request of a batch, all of one size, but "
                f"there are {sorted(counts)} pictures of {sorted(grids)} patches; give "
                "--batch-size 1 if it is requests that differ, or resize them."
            )
        merge = config.vision.spatial_merge_size
        grid = tuple(side // merge for side in grids.pop())
        both = {"vla": params, "pruner": weights}
        found = run(model, pruner, args.keep_ratio, grid, sampling, both, batch, key)
        tokens = counts.pop() * grid[0] * grid[1]
        check_kept(found.keep_indices, tokens, pruner.name, args.keep_ratio)
        return found.ids, found.lengths

    return pruned


def padded(samples: Sequence[Sample], processor: Processor) -> Batch:
    """One batch whose length is a multiple of `LENGTH_STEP`."""
    merged = [
        len(one.ids) - len(one.grids) + sum(visual_tokens(g, processor.config) for g in one.grids)
        for one in samples
    ]
    return collate(samples, processor.config, -(-max(merged) // LENGTH_STEP) * LENGTH_STEP)


def read_requests(path: Path) -> list[Request]:
    """The requests of a file of JSON lines.

    Raises:
        UserError: There is no such file or no request, or a line is none.
    """
    found = []
    for number, line in enumerate(_lines(path), 1):
        try:
            content = json.loads(line)
            names = content.get("images", [])
            if not isinstance(content["prompt"], str) or not isinstance(names, list):
                raise TypeError("prompt must be text and images a list")
            images = tuple(path.parent / name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}, is no request ({error!r}); write "
                '{"prompt": "...", "images": ["a.jpg"]}.'
            ) from error
        found.append(Request(content["prompt"], images))
    if not found:
        raise UserError(f"{path} holds no request; write one in each line.")
    return found


def read_answers(path: Path, requests: Sequence[Request], settings: str) -> list[dict[str, Any]]:
    """Answers that an earlier run left, which must be those of the first requests.

    A line that was cut off is taken away from the file.

    Raises:
        UserError: They belong to other requests, or other settings of `AnswerArgs.digest`.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        found = [json.loads(line) for line in whole.splitlines()]
        prompts = [one["prompt"] for one in found]
        images = [one["images"] for one in found]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold answers; give another --out.") from error
    first = requests[: len(found)]
    if prompts != [one.prompt for one in first] or images != [_names(one) for one in first]:
        raise UserError(f"{path} holds answers to other requests; give another --out or remove it.")
    if any(one.get("settings") != settings for one in found):
        raise UserError(
            f"{path} holds answers of another checkpoint, pruning or sampling; give another --out "
            "or remove it."
        )
    return found


def read_sample(processor: Processor, request: Request) -> Sample:
    """A request as the model reads it.

    Raises:
        UserError: A picture cannot be read, or marks and pictures differ in number.
    """
    pictures = []
    for path in request.images:
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing.") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be decoded as a picture: {error}.") from error
    return processor.sample(request.prompt, pictures)


def describe(
    processor: Processor, request: Request, sample: Sample, ids: np.ndarray, length: int
) -> dict[str, Any]:
    """One line of the answers; a plan of Impromptu-VLA comes as waypoints too."""
    config = processor.config
    text = processor.chat.decode(ids[:length])
    found = {
        "prompt": request.prompt,
        "images": _names(request),
        "answer": text,
        "prompt_tokens": len(sample.ids) - len(sample.grids),
        "visual_tokens": sum(visual_tokens(grid, config) for grid in sample.grids),
        "answer_tokens": int(length),
        "finished": int(ids[length - 1]) in config.eos_token_ids,
    }
    if BEGIN in text:
        waypoints, count = parse_answer(text)
        found |= {"waypoints": waypoints.tolist(), "waypoints_found": count}
    return found


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds lines to the answers.

    Raises:
        UserError: The file cannot be written.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _names(request: Request) -> list[str]:
    return [str(path) for path in request.images]


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text: {error}.") from error
    return (line for line in text.splitlines() if line.strip())
