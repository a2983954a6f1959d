import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.maskers.interface import BACKGROUND, CLASSES, PERSON, ROAD, VEHICLE, Frame
from data_pipelines.maskers.prompts import ClassPrompt
from data_pipelines.maskers.rgb import read_frames
from fastdrive_jax.errors import UserError

torch = pytest.importorskip("torch", reason="torch is absent (extra 'masks')")
tf = pytest.importorskip("transformers", reason="transformers is absent (extra 'masks')")

from data_pipelines.maskers.run import folder_frames, make_masks  # noqa: E402
from data_pipelines.maskers.sam3 import SAM3_PROMPTS, instances, load_sam3  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE = {"height": 56, "width": 56}


def write_sam3(folder: Path) -> Path:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vocab = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    config = tf.Sam3Config(
        vision_config=tf.Sam3VisionConfig(
            backbone_config=tf.Sam3ViTConfig(
                **small,
                num_hidden_layers=2,
                image_size=56,
                patch_size=7,
                window_size=4,
                global_attn_indexes=[1],
                pretrain_image_size=28,
            ),
            fpn_hidden_size=32,
            backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        ),
        text_config=tf.CLIPTextConfig(
            **small,
            vocab_size=len(vocab),
            projection_dim=32,
            num_hidden_layers=1,
            max_position_embeddings=32,
            bos_token_id=len(vocab) - 2,
            eos_token_id=len(vocab) - 1,
        ),
        geometry_encoder_config=tf.Sam3GeometryEncoderConfig(**small, num_layers=1),
        detr_encoder_config=tf.Sam3DETREncoderConfig(**small, num_layers=1),
        detr_decoder_config=tf.Sam3DETRDecoderConfig(**small, num_layers=1, num_queries=6),
        mask_decoder_config=tf.Sam3MaskDecoderConfig(
            hidden_size=32, num_attention_heads=2, num_upsampling_stages=2
        ),
        initializer_range=0.1,
    )
    tf.Sam3Model(config).save_pretrained(folder)
    tokenizer = tf.CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    tokenizer.save_pretrained(folder)
    content = {"image_processor_type": "Sam3ImageProcessorFast", "size": SIZE, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Threads cost so small a model more than they gain.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_sam3(tmp_path_factory.mktemp("sam3"))


def low(**thresholds) -> tuple[ClassPrompt, ...]:
    """The default prompts with thresholds that random weights reach."""
    values = {"box_threshold": 0.05, "mask_threshold": 0.5} | thresholds
    return tuple(dataclasses.replace(prompt, **values) for prompt in SAM3_PROMPTS)


@pytest.fixture(scope="module")
def masker(folder):
    return load_sam3(folder, low(), device="cpu")


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[Frame]:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in (("a", (90, 160)), ("b", (120, 100))):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(root / f"{name}.png")
    return folder_frames(root)


def test_maps_have_each_pictures_size_and_show_something(masker, frames):
    maps = masker(frames)
    assert [m.shape for m in maps] == [(90, 160), (120, 100)]
    assert all(m.dtype == np.uint8 and m.max() < len(CLASSES.names) for m in maps)
    assert all(len(np.unique(m)) > 1 for m in maps)


def test_a_batch_gives_what_its_pictures_give_one_by_one(masker, frames):
    for together, frame in zip(masker(frames), frames, strict=True):
        np.testing.assert_array_equal(together, masker([frame])[0])


def test_phrases_may_be_decoded_in_any_groups(masker, frames):
    expected = masker(frames)
    for number in (1, 2, 9):
        other = dataclasses.replace(masker, prompts_per_pass=number)
        for one, two in zip(expected, other(frames), strict=True):
            np.testing.assert_array_equal(one, two)


def test_answers_are_those_of_the_model_asked_phrase_by_phrase(masker, folder, frames):
    model = tf.Sam3Model.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    processor = tf.Sam3Processor(masker.pictures, tokenizer)
    picture = read_frames(frames[:1])[0]
    pixels = masker.pictures([picture], return_tensors="pt")["pixel_values"]
    phrases = [phrase for prompt in SAM3_PROMPTS for phrase in prompt.prompts]
    assert len(phrases) == len(masker.meanings)
    seen = model.get_vision_features(torch.cat([pixels, pixels.flip(-1)]))
    with torch.inference_mode():
        ours = masker._pass(seen, 2, 0, len(phrases))
        for k, phrase in enumerate(phrases):
            text = processor(text=phrase, return_tensors="pt")
            theirs = model(pixel_values=pixels, **text)
            for key in ("pred_logits", "pred_masks", "presence_logits"):
                torch.testing.assert_close(
                    ours[key][2 * k], theirs[key][0], atol=1e-5, rtol=1e-4, msg=f"{phrase} {key}"
                )


def test_pictures_are_seen_once_whatever_the_number_of_phrases(masker, frames, monkeypatch):
    calls = []
    encode = masker.model.get_vision_features

    def counted(pixels):
        calls.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(masker.model, "get_vision_features", counted)
    masker(frames)
    assert calls == [2]


def test_each_class_has_its_own_threshold(masker, folder, frames):
    shown = {int(i) for m in masker(frames) for i in np.unique(m)} - {BACKGROUND}
    assert len(shown) >= 2, "random weights should find two classes"
    for class_id in shown:
        prompts = tuple(
            dataclasses.replace(p, box_threshold=1.0) if p.class_id == class_id else p
            for p in masker.prompts
        )
        maps = dataclasses.replace(masker, prompts=prompts)(frames)
        assert not any((m == class_id).any() for m in maps)
        assert any(m.any() for m in maps)


def test_nothing_found_is_background(folder, frames):
    maps = load_sam3(folder, low(box_threshold=1.0), device="cpu")(frames)
    assert [m.shape for m in maps] == [(90, 160), (120, 100)]
    assert not any(m.any() for m in maps)


def outputs_of(rows, size=(8, 8)):
    """An answer from hand-made rows of (chance, presence, mask) with one query each."""
    chances, presence, masks = zip(*rows, strict=True)
    return SimpleNamespace(
        pred_logits=torch.logit(torch.tensor(chances))[:, None],
        presence_logits=torch.logit(torch.tensor(presence))[:, None],
        pred_masks=torch.stack([torch.where(m, 9.0, -9.0) for m in masks])[:, None],
        pred_boxes=torch.zeros(len(rows), 1, 4),
    )


def test_hand_made_answers_become_a_hand_made_map(masker, frames, monkeypatch):
    """road everywhere below, a surer car left of it, a person whose picture has none."""
    below, left = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    below[4:], left[:, :4] = True, True
    prompts = (
        ClassPrompt("road", ("road",), 0.5),
        ClassPrompt("vehicle", ("car",), 0.6),
        ClassPrompt("person", ("person",), 0.5),
    )
    rows = [(0.9, 0.9, below), (0.9, 0.8, left), (0.9, 0.4, torch.ones_like(left))]
    other = dataclasses.replace(masker, prompts=prompts)
    outputs = outputs_of([row for row in rows for _ in range(2)])  # of two pictures
    monkeypatch.setattr(type(other), "_pass", lambda *args: outputs)
    expected = np.zeros((8, 8), np.uint8)
    expected[4:], expected[:, :4] = ROAD, VEHICLE
    for out, size in zip(other(frames), ((90, 160), (120, 100)), strict=True):
        across = np.arange(size[0]) * 8 // size[0]
        along = np.arange(size[1]) * 8 // size[1]
        np.testing.assert_array_equal(out, expected[across][:, along])
    (found,) = instances(outputs, 0, prompts[0], (8, 8))
    assert found.score == pytest.approx(0.81)
    assert instances(outputs, 4, prompts[2], (8, 8)) == []
    surer = dataclasses.replace(prompts[2], box_threshold=0.3)
    assert [i.class_id for i in instances(outputs, 4, surer, (8, 8))] == [PERSON]


def test_settings_reach_the_masks(masker, folder, frames, tmp_path):
    settings = json.loads(json.dumps(masker.settings))
    assert settings == masker.settings
    assert settings["model"]["revision"].startswith("sha256:")
    assert settings["transformers"] == tf.__version__
    assert make_masks(frames, masker, tmp_path).made == 2
    again = load_sam3(folder, low(), device="cpu", prompts_per_pass=2)
    assert make_masks(frames, again, tmp_path).kept == 2
    other = load_sam3(folder, low(mask_threshold=0.6), device="cpu")
    assert make_masks(frames, other, tmp_path).remade == 2


def test_bfloat16_runs(folder, frames):
    masker = load_sam3(folder, low(), dtype="bfloat16", device="cpu")
    assert masker.model.dtype == torch.bfloat16
    assert [m.shape for m in masker(frames)] == [(90, 160), (120, 100)]


def test_a_video_checkpoint_holds_the_picture_model(masker, folder, frames, tmp_path):
    """The form of the hub's SAM 3: the picture model is the detector of a video model."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    video = {"model_type": "sam3_video", "detector_config": config}
    (tmp_path / "config.json").write_text(json.dumps(video))
    weights = load_file(folder / "model.safetensors")
    weights = {f"detector_model.{key}": value for key, value in weights.items()}
    weights["tracker_model.unused"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    other = load_sam3(tmp_path, low(), device="cpu")
    for one, two in zip(other(frames), masker(frames), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_is_wrong_is_named(folder, frames, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_sam3(tmp_path / "nothing", device="cpu")
    with pytest.raises(UserError, match="prompts_per_pass is 0"):
        load_sam3(folder, prompts_per_pass=0, device="cpu")
    long = (ClassPrompt("person", ("a very long phrase about people on the road",)),)
    with pytest.raises(UserError, match="too long for SAM 3"):
        load_sam3(folder, long, device="cpu")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "sam"}')
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="give SAM 3"):
        load_sam3(other, device="cpu")
    bad = tmp_path / "bad.png"
    bad.write_bytes(frames[0].picture.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"bad\.png cannot be decoded"):
        load_sam3(folder, low(), device="cpu")([frames[0], Frame(bad, "bad")])


def test_pictures_and_masks_are_those_of_transformers_with_torchvision(masker, frames):
    pytest.importorskip("torchvision", reason="transformers has SAM 3's processor with it only")
    from data_pipelines.maskers.square_pictures import Sam3PicturesPil

    theirs = tf.Sam3ImageProcessor()
    picture = read_frames(frames[:1])[0]
    ours = Sam3PicturesPil()([picture], return_tensors="pt")["pixel_values"]
    given = theirs([picture], return_tensors="pt")["pixel_values"]
    assert ours.shape == given.shape == (1, 3, 1008, 1008)
    # The two round to whole grey levels after resizing, now and then to neighbouring ones.
    assert (ours - given).abs().max() < 1.01 / 255 / 0.5
    assert (ours - given).abs().mean() < 1e-3
    pixels = masker.pictures([picture], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = masker._pass(masker.model.get_vision_features(pixels), 1, 0, 1)
    prompt = masker.prompts[0]
    (result,) = theirs.post_process_instance_segmentation(
        outputs, prompt.box_threshold, prompt.mask_threshold, [(90, 160)]
    )
    found = instances(outputs, 0, prompt, (90, 160))
    assert len(found) > 0
    np.testing.assert_array_equal(np.stack([i.mask for i in found]), result["masks"].numpy() == 1)
    np.testing.assert_allclose([i.score for i in found], result["scores"].numpy(), rtol=1e-6)
