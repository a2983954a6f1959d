import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import CONFIG, random_pruner, write_checkpoint

from experiments.answer import AnswerArgs, answer
from experiments.cli import main
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.pruner import read_pruner, write_pruner
from fastdrive_jax.inference.answering import answer_pruned
from fastdrive_jax.inference.sampling import SamplingConfig, answer_batch
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.processor import read_processor
from fastdrive_jax.models.qwen2_5_vl.sequence import collate
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig

PROMPTS = ("Where to?", "See <image> and <image>.", "And this?", "No image.", "Last <image>!")
PRUNER = ReconPrunerConfig(layer=CONFIG.text)
SIZES = ((), ((56, 84), (112, 56)), ((84, 84),), (), ((60, 100),))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("answer") / "model")


@pytest.fixture(scope="module")
def requests(checkpoint):
    """A file of requests; pictures lie beside it."""
    rng = np.random.default_rng(0)
    folder, lines = checkpoint.parent, []
    for number, (prompt, sizes) in enumerate(zip(PROMPTS, SIZES, strict=True)):
        names = [f"{number}-{i}.png" for i in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"prompt": prompt, "images": names}))
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def args(checkpoint, **settings):
    return AnswerArgs(checkpoint, max_new_tokens=6, dtype="float32", **settings)


def expected(checkpoint, prompt, pictures):
    """One by one, without padding."""
    config, params = load(checkpoint)
    batch = collate([read_processor(checkpoint).sample(prompt, pictures)], config)
    sampling = SamplingConfig(max_new_tokens=6)
    run = jax.jit(answer_batch, static_argnums=(0, 4))
    ids, lengths = run(QwenVL(config), {"params": params}, batch, jax.random.key(0), sampling)
    return read_processor(checkpoint).chat.decode(np.asarray(ids)[0, : lengths[0]])


def test_batches_answer_as_each_request_alone(checkpoint, requests, tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    found = answer(args(checkpoint, requests=requests, out=out, batch_size=2))
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    assert [one["prompt"] for one in found] == list(PROMPTS)
    for one in found:
        pictures = [Image.open(path) for path in one["images"]]
        assert one["answer"] == expected(checkpoint, one["prompt"], pictures)
    assert [one["visual_tokens"] for one in found] == [0, 6 + 8, 9, 0, 8]
    assert len({one["answer"] for one in found}) > 1


def test_an_interrupted_run_goes_on(checkpoint, requests, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    answer(args(checkpoint, requests=requests, out=whole, batch_size=2))
    text = whole.read_bytes()
    cut.write_bytes(text[: text.index(b"\n", text.index(b"\n") + 1) + 20])  # in the third line
    assert len(answer(args(checkpoint, requests=requests, out=cut, batch_size=2))) == 3
    assert cut.read_bytes() == text
    assert answer(args(checkpoint, requests=requests, out=cut)) == []


def test_devices_change_no_answer(checkpoint, requests, tmp_path):
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    answer(args(checkpoint, requests=requests, out=one, batch_size=2))
    answer(args(checkpoint, requests=requests, out=several, batch_size=2, data=2, tensor=1))
    assert several.read_bytes() == one.read_bytes()


def test_the_choice_of_kernel_is_printed_and_a_plan_is_read(checkpoint, capsys, monkeypatch):
    text = "<PLANNING>in [x, y]: [1.0, 0.0], [2.5, -0.5]</PLANNING>"
    monkeypatch.setattr("fastdrive_jax.models.qwen2_5_vl.chat.Chat.decode", lambda *_: text)
    command = ["answer", "--checkpoint", str(checkpoint), "--prompt", "Go", "--max-new-tokens", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "attention: blockwise; bfloat16; mesh {'data': 1, 'fsdp': 1, 'tensor': 1}" in printed
    assert text in printed
    (found,) = answer(args(checkpoint, prompt="Go"))
    assert found["waypoints"] == [[1.0, 0.0]] + [[2.5, -0.5]] * 5
    assert found["waypoints_found"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either --prompt"),
        ({"prompt": "a", "requests": "b", "out": "c"}, "either --prompt"),
        ({"requests": "b"}, "--out"),
        ({"requests": "b", "out": "c", "images": ("d",)}, "named in its lines"),
        ({"prompt": "a", "batch_size": 0}, "batch_size=0"),
        ({"prompt": "a", "batch_size": 3, "data": 2}, "multiple of data x fsdp = 2"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt": "a <image>"}, "1 marks <image> but there are 0 pictures"),
        ({"prompt": "a", "images": ("no.jpg",)}, "no.jpg is missing"),
        ({"requests": "none.jsonl", "out": "c"}, "none.jsonl is missing"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    checkpoint, tmp_path, monkeypatch, capsys, settings, message
):
    monkeypatch.chdir(tmp_path)
    command = ["answer", "--checkpoint", str(checkpoint)]
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no request"),
        ('{"images": []}', "line 1, is no request"),
        ('{"prompt": "a"}\n["b"]', "line 2, is no request"),
        ('{"prompt": "a", "images": "b.jpg"}', "images a list"),
    ],
)
def test_files_that_hold_no_requests_are_refused(checkpoint, tmp_path, content, message):
    path = tmp_path / "requests.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        answer(args(checkpoint, requests=path, out=tmp_path / "out.jsonl"))


def test_answers_to_other_requests_are_not_mixed_up(checkpoint, requests, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text(json.dumps({"prompt": "Other", "images": []}) + "\n")
    with pytest.raises(UserError, match="other requests"):
        answer(args(checkpoint, requests=requests, out=out))
    out.write_text("text\n")
    with pytest.raises(UserError, match="does not hold answers"):
        answer(args(checkpoint, requests=requests, out=out))


@pytest.mark.parametrize("damage", ["picture", "weights", "model_type", "tensor", "tokenizer"])
def test_damaged_files_are_named(tmp_path, capsys, damage):
    folder = write_checkpoint(tmp_path / "model")
    picture = tmp_path / "frame.png"
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(picture)
    config = json.loads((folder / "config.json").read_text())
    if damage == "picture":
        picture.write_bytes(picture.read_bytes()[:60])
        message = "frame.png cannot be decoded"
    elif damage == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        message = "model.safetensors is cut off or damaged"
    elif damage == "model_type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
        message = "config.json is of model_type 'llava'"
    elif damage == "tensor":
        text = config["text_config"] | {"num_hidden_layers": CONFIG.text.num_layers + 1}
        (folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
        message = "layers.2"
    else:
        (folder / "tokenizer.json").unlink()
        message = "holds no tokenizer.json"
    command = ["answer", "--checkpoint", str(folder), "--prompt", "Go", "--images", str(picture)]
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def alike(checkpoint):
    """Requests whose pictures are of one size, and one without."""
    rng = np.random.default_rng(1)
    folder, lines = checkpoint.parent, []
    for number in range(2):
        names = [f"alike-{number}-{i}.png" for i in range(2)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (84, 112, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"prompt": "Where to?", "images": names}))
    path = folder / "alike.jsonl"
    path.write_text("\n".join([*lines, json.dumps({"prompt": "Go"})]))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruner") / "export"
    return write_pruner(folder, random_pruner(PRUNER), PRUNER)


def test_pruned_answers_are_those_of_the_kept_tokens(checkpoint, alike, trained, tmp_path):
    def ask(name, **settings):
        return answer(args(checkpoint, requests=alike, out=tmp_path / name, **settings))

    whole = ask("whole")
    every = ask("every", pruner=trained, keep_ratio=1.0, batch_size=1)
    assert [one["answer"] for one in every] == [one["answer"] for one in whole]
    assert {one["method"] for one in every} == {"reconpruner"}
    pruned = ask("pruned", pruner=trained, keep_ratio=0.3)
    config, params = load(checkpoint)
    both = {"vla": params, "pruner": read_pruner(trained)[1]}
    pruner, sampling = make_pruner("reconpruner", config=PRUNER), SamplingConfig(max_new_tokens=6)
    run = jax.jit(functools.partial(answer_pruned, QwenVL(config), pruner, 0.3, (3, 4), sampling))
    processor = read_processor(checkpoint)
    for one in pruned[:2]:
        pictures = [Image.open(path) for path in one["images"]]
        batch = collate([processor.sample(one["prompt"], pictures)], config)
        found = run(both, batch, jax.random.key(0))
        want = processor.chat.decode(np.asarray(found.ids)[0, : found.lengths[0]])
        assert (one["answer"], one["visual_tokens"], one["keep_ratio"]) == (want, 24, 0.3)
    assert pruned[2]["answer"] == whole[2]["answer"]  # there is nothing to prune
    assert pruned[0]["answer"] != whole[0]["answer"]
    assert ask("pruned", pruner=trained, keep_ratio=0.3) == []
    other = write_pruner(tmp_path / "export", jax.tree.map(np.negative, both["pruner"]), PRUNER)
    for change in ({"keep_ratio": 0.6}, {"pruner": other}, {"repetition_penalty": 1.2}):
        with pytest.raises(UserError, match="pruned holds answers of another checkpoint, pruning"):
            ask("pruned", **({"pruner": trained, "keep_ratio": 0.3} | change))


def test_what_cannot_be_pruned_is_said(checkpoint, requests, trained, tmp_path):
    with pytest.raises(UserError, match=r"all of one size, but there are \[2\] pictures of \[\("):
        answer(args(checkpoint, requests=requests, out=tmp_path / "a", method="uniform"))
    lines = (tmp_path / "uneven.jsonl").open("w")
    for count in (1, 3):
        names = [str(checkpoint.parent / "2-0.png")] * count
        print(json.dumps({"prompt": "a", "images": names}), file=lines)
    lines.close()
    uneven = {"requests": tmp_path / "uneven.jsonl", "method": "uniform", "keep_ratio": 1.0}
    with pytest.raises(UserError, match=r"there are \[1, 3\] pictures of \[\(6, 6\)\]"):
        answer(args(checkpoint, out=tmp_path / "b", batch_size=2, **uneven))
    alone = answer(args(checkpoint, out=tmp_path / "c", **uneven))
    del uneven["method"]
    whole = answer(args(checkpoint, out=tmp_path / "d", batch_size=2, **uneven))
    assert [one["answer"] for one in alone] == [one["answer"] for one in whole]
    with pytest.raises(UserError, match="vlapruner needs state"):
        args(checkpoint, prompt="a", method="vlapruner")
    with pytest.raises(UserError, match="jointpruner needs"):
        args(checkpoint, prompt="a", method="jointpruner", pruner=trained)
    with pytest.raises(UserError, match="there is no such folder"):
        answer(args(checkpoint, prompt="a", pruner=tmp_path / "none"))
    sampling = SamplingConfig(6)
    for name, other in (("random", True), ("divprune", False)):
        digests = {
            args(checkpoint, prompt="a", method=name, **change).digest(sampling)
            for change in ({}, {"seed": 1}, {"batch_size": 2})
        }
        assert len(digests) == (3 if other else 1)
    with pytest.raises(UserError, match="prior prunes by the mean training mask"):
        args(checkpoint, prompt="a", method="prior")
    with pytest.raises(UserError, match="name its folder with --pruner"):
        args(checkpoint, prompt="a", method="reconpruner")
    with pytest.raises(UserError, match="divprune takes no trained ReconPruner"):
        args(checkpoint, prompt="a", method="divprune", pruner=trained)
    with pytest.raises(UserError, match="keep_ratio=0"):
        args(checkpoint, prompt="a", method="divprune", keep_ratio=0.0)
    with pytest.raises(UserError, match="did you mean 'divprune'"):
        args(checkpoint, prompt="a", method="divprun")


OWN = """
import jax.numpy as jnp
from fastdrive_jax.pruning import Pruner

def contrast():
    needs = frozenset({"pixels"})
    return Pruner("contrast", lambda params, inputs, key: jnp.var(inputs.pixels, axis=-1), needs)

def stuck():
    def choose(params, inputs, key, k):
        return jnp.zeros((len(inputs.tokens), k), int)
    return Pruner("stuck", choose=choose)
"""


def test_methods_of_ones_own_answer_or_are_refused(checkpoint, requests, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    asked = {"prompt": "See.", "images": (requests.parent / "4-0.png",), "keep_ratio": 0.5}
    (found,) = answer(args(checkpoint, method=f"{tmp_path}/own.py:contrast", **asked))
    assert found["visual_tokens"] == 8
    with pytest.raises(UserError, match=r"'stuck' at a keep ratio of 0\.5 keeps a token twice"):
        answer(args(checkpoint, method=f"{tmp_path}/own.py:stuck", **asked))
