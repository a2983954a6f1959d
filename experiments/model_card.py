"""The README of an export, written from what its run says of itself and nothing else."""

import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import jinja2

from experiments.card_loading import LOADING, QWEN_LOADING, onnx_call
from experiments.export_check import Difference
from experiments.export_source import Facts, Source
from fastdrive_jax.evaluation.markdown import kept_share
from fastdrive_jax.evaluation.results import Row, select
from fastdrive_jax.export.programs import Bucket
from fastdrive_jax.pruning.select import num_keep

METHODS = ("reconpruner", "random", "uniform", "prior", "ground_truth", "oracle")
REFERENCES = ("unpruned", "no_image")  # which have no keep ratio of their own
METRICS = (
    *("foreground_recall", "foreground_precision", "object_recall"),
    *("l2_temavg", "ade", "fde"),
)

WRITTEN_BY = "Written by `fastdrive export`"
CARD = """\
# {{ title }}

{{ written_by }} of fastdrive-jax {{ version }} from `{{ source.path }}`.

## What it is

{% if source.vla -%}
A ReconPruner and the driving VLA whose visual tokens it prunes. {{ source.vla.visual_tokens }} \
tokens of {{ source.vla.cameras | join(", ") }}, pictures of \
{{ source.vla.image_size[0] }} x {{ source.vla.image_size[1] }} (height x width), \
{{ source.vla.vocabulary.steps }} waypoints half a second apart, \
{{ "{:,}".format(parameters.vla) }} + {{ "{:,}".format(parameters.pruner) }} parameters.\
{% if not arrays %} This folder holds the pruner alone.{% endif %}
{%- elif source.qwen -%}
A ReconPruner and the Qwen2.5-VL whose visual tokens it prunes, read from \
`{{ source.checkpoint }}`. {{ source.qwen.visual_tokens }} tokens of \
{{ source.qwen.pictures }} pictures of {{ source.qwen.image_size[0] }} x \
{{ source.qwen.image_size[1] }} (height x width), prompts of up to {{ source.qwen.prompt_ids }} \
ids, answers of up to {{ source.qwen.sampling.max_new_tokens }}, {{ source.qwen.dtype }}, \
{{ "{:,}".format(parameters.vla) }} + {{ "{:,}".format(parameters.pruner) }} parameters.
{%- else -%}
A ReconPruner, {{ "{:,}".format(parameters.pruner) }} parameters, for visual tokens of size \
{{ source.pruner.layer.hidden_size }}. {{ source.why }}
{%- endif %}

Parameters were read from `{{ source.read }}`{% if facts.step is not none %}, \
step {{ facts.step }}{% endif %}.

## How to load it

{% for form in forms %}{{ loading[form] }}
{% endfor %}
{% if arrays -%}
## Inputs and answers

B frames a call. Kept tokens K, of {{ model.visual_tokens }}: {{ budgets }}.\
{% if several %} Only `stablehlo/` has more than the first.{% endif %}

| | name | array | meaning |
| --- | --- | --- | --- |
{% for line in arrays -%}
| {{ line | join(" | ") }} |
{% endfor %}
{% endif -%}
{% if differences -%}
## Check

On {{ differences[0].n }} {{ frames }}, read back from this folder and compared with the \
training code on {{ device }}:

| form | quantity | largest difference | same kept tokens |
| --- | --- | --- | --- |
{% for one in differences -%}
| {{ one.form }} | {{ one.quantity }} | {{ "%.2g" | format(one.largest) }} | \
{% if one.kept is not none %}{{ "%.2f%%" | format(100 * one.kept) }}{% endif %} |
{% endfor %}
{% if lowered %}
Of the programs for {{ lowered }}, only those for this device were run.
{% endif %}
{% else -%}
Not checked: {{ unchecked }}

{% endif -%}
## Training

{% if facts.training -%}
Encoder: {{ facts.training.encoder }}\
{% if facts.encoder %} (`{{ facts.encoder }}`){% endif %}. The complete setting of the run:

```json
{{ setting }}
```
{%- else -%}
`{{ source.path }}` does not say how it was trained.
{%- endif %}

## Data

{% if facts.data -%}
Shards `{{ facts.data.path }}`, made from {{ facts.data.source }}\
{% if facts.data_digest %}, digest `{{ facts.data_digest }}`{% endif %}.

| split | samples | cameras |
| --- | --- | --- |
{% for split, count in facts.data.samples.items() -%}
| {{ split }} | {{ count }} | {{ facts.data.cameras | join(", ") }} |
{% endfor %}
Pictures of {{ facts.data.image_size | join(" x ") }}. Foreground: {{ foreground | join(", ") }}. \
SHA-256 of the shards:

```
{% for name, shard in facts.data.shards.items() -%}
{{ shard.sha256 }}  {{ name }}
{% endfor -%}
```
{%- elif facts.data_digest -%}
Shards with the digest `{{ facts.data_digest }}`; {% if facts.results %}where the run says they \
are, there are others or none.{% else %}the run does not say where they are before it has \
figures.{% endif %}
{%- else -%}
`{{ source.path }}` does not say what it was trained on.
{%- endif %}

## Figures

{% if rows -%}
From `{{ facts.results }}`, which has more. Measured by the run on the split `val`, on n images \
or samples, with 95% intervals.

| metric | kept | {{ methods | join(" | ") }} | n |
| --- | --- |{{ " --- |" * (methods | length + 1) }}
{% for row in rows -%}
| {{ row.metric }} | {{ row.kept }} | {{ row.cells | join(" | ") }} | {{ row.n }} |
{% endfor %}
{% for line in references -%}
- {{ line }}
{% endfor -%}
{%- else -%}
`{{ source.path }}` holds no figures.
{%- endif %}

## Licences

The code, including `run.py` and the PyTorch module: {{ license }}. The run records no licence \
for these weights. The terms of the data and of the encoder named above apply to everything \
derived from them; check them before you redistribute this export.\
{% if source.qwen %} Files of the checkpoint that begin with LICENSE or NOTICE are in `processor/` \
of `policy/` and `int8/`.{% endif %}
"""


def _budgets(model: Any, buckets: Sequence[Bucket]) -> str:
    found = {b.keep_ratio: num_keep(model.visual_tokens, b.keep_ratio) for b in buckets}
    return ", ".join(f"{kept} at {ratio:g}" for ratio, kept in found.items())


def _arrays(source: Source) -> list[tuple[str, ...]]:
    """In or out, name, array and meaning of all that the whole model takes and answers."""
    kept = ("out", "`keep_indices`", "int32 [B, K]", "kept tokens, raster order, image by image")
    if source.qwen is not None:
        asked = source.qwen
        pictures = (asked.pictures, *asked.image_size)
        given = [
            ("in", "`ids`", f"int32 [B, {asked.prompt_ids}]", "the prompt's, padded on the right"),
            ("in", "`lengths`", "int32 [B]", "how many of them are real"),
            ("out", "`ids`", f"int32 [B, {asked.sampling.max_new_tokens}]", "the answer's"),
            ("out", "`lengths`", "int32 [B]", "how many of them are real"),
        ]
    else:
        pictures = (len(source.vla.cameras), *source.vla.image_size)
        steps = source.vla.vocabulary.steps
        given = [
            ("in", "`speed`", "float32 [B]", "metres per second"),
            ("in", "`command`", "int32 [B]", "0 left, 1 straight, 2 right"),
            (
                "out",
                "`waypoints`",
                f"float32 [B, {steps}, 2]",
                "metres ahead and to the left, each 0.5 s",
            ),
        ]
    shape = ", ".join(map(str, pictures))
    images = ("in", "`images`", f"uint8 [B, {shape}, 3]", "RGB, resized already, in camera order")
    return [images, *given, kept]


def model_card(
    source: Source,
    forms: Sequence[str],
    buckets: Sequence[Bucket],
    platforms: Sequence[str],
    differences: Sequence[Difference],
    opset: int,
    device: str,
    checked: bool,
) -> str:
    """The page in Markdown.

    Args:
        source: What was exported.
        forms: What is in the folder.
        buckets: Of the programs.
        platforms: Of the programs.
        differences: What the check found; empty without one.
        opset: Of ONNX.
        device: That the check ran on.
        checked: Whether a check was asked for.
    """
    facts = source.facts
    described = ", ".join(f"{100 * b.keep_ratio:g}% kept at batch {b.batch}" for b in buckets)
    values = {
        "platforms": ", ".join(platforms),
        "buckets": described,
        "ratio": buckets[0].keep_ratio,
        "batch": buckets[0].batch,
        "opset": opset,
        **onnx_call(source, buckets[0].batch),
    }
    fill = ("stablehlo", "onnx")  # the others have braces of their own at times
    texts = LOADING if source.qwen is None else QWEN_LOADING
    loading = {k: v.format(**values) if k in fill else v for k, v in texts.items()}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    methods, rows = figures(facts.rows)
    model = source.vla or source.qwen
    package = metadata.metadata("fastdrive-jax")
    return environment.from_string(CARD).render(
        title=_title(source),
        written_by=WRITTEN_BY,
        version=package["Version"],
        license=package["License-Expression"],
        source=source,
        facts=facts,
        forms=forms,
        loading=loading,
        differences=differences,
        frames=_frames(source),
        device=device,
        unchecked="none of these forms runs on this device."
        if checked
        else "it was exported with `--no-check`.",
        lowered="stablehlo" in forms and ", ".join(platforms),
        arrays=() if model is None or set(forms) == {"pruner"} else _arrays(source),
        budgets=_budgets(model, buckets) if model else "",
        model=model,
        several=len({bucket.keep_ratio for bucket in buckets}) > 1,
        parameters={name: _count(tree) for name, tree in source.params.items()},
        setting=json.dumps(facts.training, indent=1),
        foreground=_foreground(facts),
        methods=methods,
        rows=rows,
        references=references(facts.rows),
    )


def _frames(source: Source) -> str:
    """What the check ran on."""
    if source.qwen is not None:
        return "frames of the synthetic world (the pruner alone: of random tokens)"
    if source.vla is not None:
        return "frames of the synthetic world"
    return "pictures of random tokens"


def _title(source: Source) -> str:
    if source.qwen is not None:
        return "Pruned Qwen2.5-VL"
    return "ReconPruner" if source.vla is None else "Pruned driving policy"


def figures(rows: Sequence[Row]) -> tuple[list[str], list[dict[str, Any]]]:
    """Methods in their columns, and a line for each metric and ratio of the pruner's figures."""
    kept = [row for row in rows if row.method == METHODS[0] and row.metric in METRICS]
    methods = [name for name in METHODS if select(rows, method=name)]
    lines = []
    for row in kept:
        cells = []
        for name in methods:
            found = select(rows, method=name, metric=row.metric, keep_ratio=row.keep_ratio)
            cells.append(_cell(found[0]) if len(found) == 1 else _mean(found))
        share = kept_share(row.keep_ratio)
        unit = f" ({row.unit})" if row.unit else ""
        lines.append({"metric": row.metric + unit, "kept": share, "cells": cells, "n": row.n})
    return methods, lines


def references(rows: Sequence[Row]) -> list[str]:
    """A line for each figure that no pruner comes with."""
    return [
        f"{row.method}, {row.metric}{f' ({row.unit})' if row.unit else ''}: {_cell(row)}, n {row.n}"
        for row in rows
        if row.method in REFERENCES and row.metric in METRICS
    ]


def _cell(row: Row) -> str:
    interval = "" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"
    return f"{row.value:.3f}{interval}"


def _mean(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return f"{sum(row.value for row in rows) / len(rows):.3f} (mean of {len(rows)} seeds)"


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _foreground(facts: Facts) -> list[str]:
    if facts.data is None:
        return []
    classes = facts.data["classes"]
    return [classes["names"][number] for number in classes["foreground"]]
