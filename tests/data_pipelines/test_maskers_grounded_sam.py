import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.maskers.interface import (
    BACKGROUND,
    CLASSES,
    PERSON,
    ROAD,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    VEHICLE,
    Frame,
)
from data_pipelines.maskers.prompts import DEFAULT_PROMPTS, ClassPrompt
from fastdrive_jax.errors import UserError

torch = pytest.importorskip("torch", reason="torch is absent (extra 'masks')")
tf = pytest.importorskip("transformers", reason="transformers is absent (extra 'masks')")

from tiny_maskers import write_detector, write_sam, write_sam2  # noqa: E402

from data_pipelines.maskers import checkpoints  # noqa: E402
from data_pipelines.maskers.grounded_sam import GroundedSam, load_grounded_sam  # noqa: E402
from data_pipelines.maskers.grounding_dino import without_copies  # noqa: E402
from data_pipelines.maskers.run import folder_frames, make_masks  # noqa: E402
from data_pipelines.maskers.segment_anything import load_segment_anything  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Threads cost such small models more than they gain.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("checkpoints")
    return SimpleNamespace(
        detector=write_detector(root / "dino"),
        sam=write_sam(root / "sam"),
        sam2=write_sam2(root / "sam2"),
    )


def low(**thresholds) -> tuple[ClassPrompt, ...]:
    """The default prompts with thresholds that random weights reach."""
    values = {"box_threshold": 0.05, "text_threshold": 0.02} | thresholds
    return tuple(dataclasses.replace(prompt, **values) for prompt in DEFAULT_PROMPTS)


@pytest.fixture(scope="module", params=["sam", "sam2"])
def masker(request, folders) -> GroundedSam:
    return load_grounded_sam(
        folders.detector, getattr(folders, request.param), low(), device="cpu", box_batch=5
    )


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[Frame]:
    """Three pictures, two of one size."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in (("a", (90, 160)), ("b", (120, 100)), ("c", (90, 160))):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(root / f"{name}.png")
    return folder_frames(root)


def test_maps_have_each_pictures_size_and_show_something(masker, frames):
    maps = masker(frames)
    assert [m.shape for m in maps] == [(90, 160), (120, 100), (90, 160)]
    assert all(m.dtype == np.uint8 and m.max() < len(CLASSES.names) for m in maps)
    assert all(len(np.unique(m)) > 1 for m in maps)


def test_a_batch_gives_what_its_pictures_give_one_by_one(masker, frames):
    for together, frame in zip(masker(frames), frames, strict=True):
        np.testing.assert_array_equal(together, masker([frame])[0])


def test_without_boxes_all_is_background_and_sam_is_not_asked(folders, frames, monkeypatch):
    masker = load_grounded_sam(folders.detector, folders.sam2, low(box_threshold=1.0), device="cpu")

    def asked(*args, **kwargs):
        raise AssertionError("SAM was asked without a box")

    monkeypatch.setattr(masker.segmenter.model, "get_image_embeddings", asked)
    for out, size in zip(masker(frames), [(90, 160), (120, 100), (90, 160)], strict=True):
        np.testing.assert_array_equal(out, np.zeros(size, np.uint8))


def test_each_class_has_its_own_threshold(masker, frames):
    found = {int(p) for own in masker.detect(read(frames)) for p in own.prompts}
    assert len(found) >= 2, "random weights should find two classes"
    for index in found:
        prompts = list(masker.detector.prompts)
        prompts[index] = dataclasses.replace(prompts[index], box_threshold=1.0)
        detector = dataclasses.replace(masker.detector, prompts=tuple(prompts))
        other = dataclasses.replace(masker, detector=detector)
        now = {int(p) for own in other.detect(read(frames)) for p in own.prompts}
        assert index not in now
        assert found - {index} <= now
        assert not (other(frames[:1])[0] == prompts[index].class_id).any()


def read(frames):
    from data_pipelines.maskers.rgb import read_frames

    return read_frames(frames)


def answer(detector, rows, boxes, batch=1):
    """The detector's output from hand-made word chances: one {word place: chance} per query."""
    length = detector.model.config.max_text_len
    chances = torch.zeros(batch, len(rows), length)
    for i, row in enumerate(rows):
        for place, chance in row.items():
            chances[:, i, place] = chance
    module = sys.modules[type(detector.model).__module__]
    return module.GroundingDinoObjectDetectionOutput(
        logits=torch.logit(chances), pred_boxes=torch.tensor([boxes] * batch)
    )


def places(detector, name, phrase) -> tuple[int, ...]:
    index = [p.name for p in detector.prompts].index(name)
    return detector.spans[index][detector.prompts[index].prompts.index(phrase)]


@pytest.fixture(scope="module")
def strict(folders) -> GroundedSam:
    """Default thresholds."""
    return load_grounded_sam(folders.detector, folders.sam2, device="cpu")


def test_the_words_of_each_prompt_are_found_in_the_text(strict):
    detector = strict.detector
    ids = detector.text["input_ids"][0].tolist()
    words = detector.processor.tokenizer.convert_ids_to_tokens(ids)
    for prompt, spans in zip(detector.prompts, detector.spans, strict=True):
        told = [" ".join(words[place] for place in span) for span in spans]
        assert told == list(prompt.prompts)


def test_hand_made_answers_give_the_right_classes_and_boxes(strict):
    detector = strict.detector
    traffic_l, light = places(detector, "traffic_light", "traffic light")
    traffic_s, sign = places(detector, "traffic_sign", "traffic sign")
    (car,) = places(detector, "vehicle", "car")
    (truck,) = places(detector, "vehicle", "truck")
    (person,) = places(detector, "person", "person")
    rows = [
        {car: 0.9, truck: 0.8},  # merged words of one class
        {traffic_s: 0.6, sign: 0.05, traffic_l: 0.5, light: 0.5},  # "traffic" alone says nothing
        {light: 0.55},  # part of a prompt: on average 0.275, above the text threshold
        {light: 0.35},  # on average 0.175, below it
        {person: 0.29},  # below the box threshold of its class
        {car: 0.4, person: 0.7},  # two classes
        {traffic_s: 0.28, sign: 0.28},  # above its own threshold, though not above the others'
        {car: 0.31},
    ]
    boxes = [[0.5, 0.5, 0.2 * 1.4**i, 0.4] for i in range(len(rows))]  # no copies
    boxes[7] = [0.0, 0.5, 0.5, 0.5]  # half of it outside
    outputs = answer(detector, rows, boxes, batch=2)
    first, second = detector.decode(outputs, [(100, 200), (50, 60)])
    names = [detector.prompts[i].name for i in first.prompts]
    got = sorted(zip(names, first.scores.round(4).tolist(), strict=True))
    assert got == [
        ("person", pytest.approx(0.7)),
        ("traffic_light", pytest.approx(0.5)),
        ("traffic_light", pytest.approx(0.55)),
        ("traffic_sign", pytest.approx(0.28)),
        ("vehicle", pytest.approx(0.31)),
        ("vehicle", pytest.approx(0.9)),
    ]
    by_score = {round(float(s), 2): b for s, b in zip(first.scores, first.boxes, strict=True)}
    np.testing.assert_allclose(by_score[0.9], [80, 30, 120, 70], atol=1e-4)
    np.testing.assert_allclose(by_score[0.31], [0, 25, 50, 75], atol=1e-4)
    by_score = {round(float(s), 2): b for s, b in zip(second.scores, second.boxes, strict=True)}
    np.testing.assert_allclose(by_score[0.9], [24, 15, 36, 35], atol=1e-4)


def test_hand_made_boxes_become_a_hand_made_map(strict, frames, monkeypatch):
    detector = strict.detector
    (road,) = places(detector, "road", "road")
    (bus,) = places(detector, "vehicle", "bus")
    (walker,) = places(detector, "person", "pedestrian")
    sign = places(detector, "traffic_sign", "stop sign")
    outputs = answer(
        detector,
        [{road: 0.9}, {bus: 0.9}, {walker: 0.4}, dict.fromkeys(sign, 0.5)],
        [
            [0.5, 0.75, 1.0, 0.5],
            [0.25, 0.5, 0.5, 1.0],
            [0.125, 0.5, 0.25, 0.4],
            [0.9, 0.1, 0.1, 0.2],
        ],
    )
    monkeypatch.setattr(detector.model, "forward", lambda **inputs: outputs)

    def rectangles(pictures, boxes, thresholds):
        assert [t.tolist() for t in thresholds] == [[0.5] * len(own) for own in boxes]
        out = [np.zeros((len(b), *p.shape[:2]), bool) for b, p in zip(boxes, pictures, strict=True)]
        for own, masks in zip(boxes, out, strict=True):
            for mask, (left, top, right, bottom) in zip(
                masks, own.round().astype(int), strict=True
            ):
                mask[top:bottom, left:right] = True
        return out

    masker = dataclasses.replace(strict, segmenter=rectangles)
    (out,) = masker(frames[:1])
    expected = np.full((90, 160), BACKGROUND, np.uint8)
    expected[45:] = ROAD
    expected[:, :80] = VEHICLE
    expected[27:63, :40] = PERSON
    expected[0:18, 136:152] = TRAFFIC_SIGN
    np.testing.assert_array_equal(out, expected)


def test_masks_of_boxes_are_transformers_own(folders, frames):
    masker = load_grounded_sam(folders.detector, folders.sam, low(), device="cpu")
    boxes = np.array([[10, 10, 90, 60], [40.5, 5, 150, 85]], np.float32)
    (picture,) = read(frames[:1])
    (masks,) = masker.segmenter([picture], [boxes], [np.array([0.5, 0.3])])
    processor = tf.SamProcessor(tf.SamImageProcessorPil.from_pretrained(folders.sam))
    inputs = processor(images=picture, input_boxes=[boxes.tolist()], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    model = tf.SamModel.from_pretrained(folders.sam)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    with torch.inference_mode():
        outputs = model(
            pixel_values=inputs["pixel_values"],
            input_boxes=inputs["input_boxes"],
            multimask_output=False,
        )
    for k, threshold in enumerate((0.5, 0.3)):
        logit = float(np.log(threshold / (1 - threshold)))
        full = processor.post_process_masks(outputs.pred_masks, *sizes, mask_threshold=logit)[0]
        np.testing.assert_array_equal(masks[k], full[k, 0].numpy())
    assert masks[0].any()
    assert not masks[0].all()


def test_a_video_checkpoint_of_sam_2_is_its_picture_model(folders, tmp_path):
    """The form of the hub's SAM 2.1: another model type and weights that pictures don't need."""
    config = tf.Sam2Config.from_pretrained(folders.sam2).to_dict()
    small = {
        f"memory_{key}": value
        for key, value in {
            "attention_hidden_size": 16,
            "attention_num_layers": 1,
            "attention_num_attention_heads": 1,
            "attention_feed_forward_hidden_size": 16,
            "attention_rope_feat_sizes": [4, 4],
            "encoder_hidden_size": 16,
            "encoder_output_channels": 8,
            "fuser_num_layers": 1,
            "fuser_embed_dim": 16,
            "fuser_intermediate_dim": 16,
        }.items()
    }
    parts = {
        key: config[key] | {"model_type": f"sam2_video_{key.removesuffix('_config')}"}
        for key in ("prompt_encoder_config", "mask_decoder_config")
    }
    vision = tf.Sam2Config.from_pretrained(folders.sam2).vision_config
    video = tf.Sam2VideoConfig(
        vision_config=vision, **parts, **small, mask_downsampler_embed_dim=16
    )
    tf.Sam2VideoModel(video).save_pretrained(tmp_path)
    shutil.copy(folders.sam2 / "preprocessor_config.json", tmp_path)
    checkpoint = checkpoints.find_checkpoint(tmp_path)
    assert checkpoint.model_type == "sam2_video"
    segmenter = load_segment_anything(checkpoint, "float32", "cpu")
    assert type(segmenter.model) is tf.Sam2Model


def test_copies_of_a_box_are_left_out():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 8]], np.float32)
    scores = np.array([0.5, 0.9, 0.3, 0.4], np.float32)
    assert without_copies(boxes, scores, 0.85).tolist() == [1, 2]
    assert without_copies(boxes, scores, 0.9).tolist() == [1, 3, 2]
    assert without_copies(boxes[:0], scores[:0], 0.5).tolist() == []


def test_bfloat16_runs(folders, frames):
    masker = load_grounded_sam(
        folders.detector, folders.sam2, low(), dtype="bfloat16", device="cpu"
    )
    assert masker.detector.model.dtype == masker.segmenter.model.dtype == torch.bfloat16
    assert masker(frames[:1])[0].shape == (90, 160)
    assert masker.settings["dtype"] == "bfloat16"


def test_settings_tell_models_prompts_and_versions_and_reach_the_masks(folders, frames, tmp_path):
    prompts = low(mask_threshold=0.4)
    masker = load_grounded_sam(folders.detector, folders.sam, prompts, device="cpu")
    settings = json.loads(json.dumps(masker.settings))
    assert settings == masker.settings
    assert settings["detector"]["model"] == "dino"
    assert settings["detector"]["revision"].startswith("sha256:")
    assert settings["detector"]["revision"] != settings["segmenter"]["revision"]
    assert settings["prompts"][0]["mask_threshold"] == 0.4
    assert settings["transformers"] == tf.__version__
    assert make_masks(frames, masker, tmp_path).made == 3
    again = load_grounded_sam(folders.detector, folders.sam, prompts, device="cpu")
    assert make_masks(frames, again, tmp_path).kept == 3
    other = load_grounded_sam(folders.detector, folders.sam, low(), device="cpu")
    assert make_masks(frames, other, tmp_path).remade == 3


def test_other_weights_are_another_model(folders, tmp_path):
    shutil.copytree(folders.sam, tmp_path / "sam")
    before = checkpoints.find_checkpoint(folders.sam).identity
    assert checkpoints.find_checkpoint(tmp_path / "sam").identity == before
    weights = tmp_path / "sam" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoints.find_checkpoint(tmp_path / "sam").identity != before


def spoil(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "a weight is missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["mask_decoder.iou_token.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "no processor":
        (folder / "processor_config.json").unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "no weights",
        "no config",
        "cut weights",
        "a weight is missing",
        "config is no JSON",
        "no processor",
    ],
)
def test_an_incomplete_checkpoint_is_one_sentence(folders, tmp_path, kind):
    folder = shutil.copytree(folders.sam, tmp_path / "spoilt")
    spoil(folder, kind)
    with pytest.raises(UserError) as caught:
        load_grounded_sam(folders.detector, folder, device="cpu")
    assert "spoilt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_wrong_kind_of_checkpoint_or_setting_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="detector must be GroundingDINO"):
        load_grounded_sam(folders.sam, folders.sam, device="cpu")
    with pytest.raises(UserError, match="segmenter must be SAM 2"):
        load_grounded_sam(folders.detector, folders.detector, device="cpu")
    with pytest.raises(UserError, match="is not a folder"):
        load_grounded_sam(tmp_path / "nothing", folders.sam, device="cpu")
    with pytest.raises(UserError, match="int8"):
        load_grounded_sam(folders.detector, folders.sam, dtype="int8", device="cpu")
    with pytest.raises(UserError, match="nms_iou is 0"):
        load_grounded_sam(folders.detector, folders.sam, nms_iou=0, device="cpu")
    unknown = (ClassPrompt("person", ("qqq",)),)
    with pytest.raises(UserError, match='no word of the prompt "qqq"'):
        load_grounded_sam(folders.detector, folders.sam, unknown, device="cpu")
    long = (ClassPrompt("person", tuple("person " * 4 + "car " * k for k in range(1, 24))),)
    with pytest.raises(UserError, match="tokens long"):
        load_grounded_sam(folders.detector, folders.sam, long, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_named(folders):
    with pytest.raises(UserError, match="no CUDA device"):
        load_grounded_sam(folders.detector, folders.sam, device="cuda")


def test_without_torch_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[masks\]'"):
        load_grounded_sam(folders.detector, folders.sam)


def test_a_damaged_picture_is_named(masker, frames, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(frames[0].picture.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"bad\.png cannot be decoded"):
        masker([frames[0], Frame(path, "bad")])


def test_the_light_of_a_hand_made_answer_is_class_light(strict):
    detector = strict.detector
    row = dict.fromkeys(places(detector, "traffic_light", "traffic light"), 0.6)
    (found,) = detector.decode(answer(detector, [row], [[0.5, 0.5, 0.2, 0.2]]), [(60, 60)])
    assert [detector.prompts[i].class_id for i in found.prompts] == [TRAFFIC_LIGHT]


def test_pictures_and_masks_are_those_of_transformers_with_torchvision(frames):
    pytest.importorskip("torchvision", reason="transformers has SAM 2's processor with it only")
    from data_pipelines.maskers.square_pictures import Sam2PicturesPil

    (picture,) = read(frames[:1])
    ours = Sam2PicturesPil()([picture], return_tensors="pt")["pixel_values"]
    theirs = tf.Sam2ImageProcessor()([picture], return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (1, 3, 1024, 1024)
    # The two round to whole grey levels after resizing, now and then to neighbouring ones.
    assert (ours - theirs).abs().max() < 1.01 / 255 / 0.224
    assert (ours - theirs).abs().mean() < 1e-3
