"""Demonstrations: recorded the same by any number of processes, resumed, and read in batches."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.decode import decode_image
from data_pipelines.robot import demonstrations, rendering
from data_pipelines.robot.demonstrations import record_demonstrations
from data_pipelines.robot.episode_loader import EpisodeLoaderConfig, identity, make_episode_loader
from data_pipelines.robot.episodes import (
    HORIZON,
    StepSource,
    open_episodes,
    open_together,
    read_statistics,
    statistics,
)
from data_pipelines.robot.expert import expert_action
from data_pipelines.robot.policies import Acted, RobotPolicy
from data_pipelines.robot.recording import DemoConfig, record_episode
from data_pipelines.robot.tabletop import SEGMENTS, Tabletop, TabletopState
from data_pipelines.robot.tasks import TASKS
from fastdrive_jax.errors import UserError

simulated = pytest.mark.skipif(rendering.absent() is not None, reason=str(rendering.absent()))
CONFIG = DemoConfig(
    episodes=1, val_episodes=1, image_size=(32, 48), noise=0.2, episodes_per_shard=4
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("robot") / "demos"
    return record_demonstrations(out, CONFIG, workers=1, progress=False)


def batches(episodes, **settings):
    config = EpisodeLoaderConfig(**{"batch_size": 4, "read_threads": 1, **settings})
    return make_episode_loader(episodes, "train", config)


def taken(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_settings_that_make_no_sense_are_refused():
    for change, named in (({"episodes": 0}, "episodes=0"), ({"noise": 1.0}, "noise=1.0")):
        with pytest.raises(UserError, match=named):
            DemoConfig(**change)
    for change, named in (({"chunk": HORIZON + 1}, "at most 32"), ({"chunk": 0}, "chunk=0")):
        with pytest.raises(UserError, match=named):
            EpisodeLoaderConfig(4, **change)


def test_statistics_are_openvlas():
    rng = np.random.default_rng(0)
    actions, proprio = rng.normal(size=(501, 7)), rng.normal(size=(501, 8))
    found = statistics("mine", actions, proprio, 9)["mine"]
    assert found["num_transitions"] == 501
    assert found["num_trajectories"] == 9
    assert found["action"]["mask"] == [True] * 6 + [False]
    np.testing.assert_allclose(found["action"]["q01"], np.sort(actions, 0)[5])
    np.testing.assert_allclose(found["proprio"]["q99"], np.sort(proprio, 0)[495])
    assert set(found["proprio"]) == {"mean", "std", "max", "min", "q01", "q99"}


@simulated
def test_manifest_and_statistics_tell_what_is_there(recorded):
    manifest = json.loads((recorded.path / "manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["train"]["episodes"] == len(TASKS)
    assert counts["val"]["episodes"] == len(TASKS)
    assert counts["train"]["successes"] >= len(TASKS) - 1
    assert counts["train"]["steps"] == recorded.steps("train") == len(StepSource(recorded, "train"))
    assert len(recorded.shards["train"]) == 2
    source = StepSource(recorded, "train")
    actions = np.array([source[k]["action"] for k in range(len(source))])
    found = read_statistics(recorded.path / "dataset_statistics.json")
    np.testing.assert_allclose(found["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    assert found["num_transitions"] == len(actions)
    with pytest.raises(UserError, match="tabletop_expert"):
        read_statistics(recorded.path / "dataset_statistics.json", "bridge")
    assert "tensorflow" not in sys.modules


@simulated
def test_steps_are_what_the_environment_showed(recorded):
    note = recorded.episodes["train"][1]
    source = StepSource(recorded, "train")
    steps = [source[k] for k in range(len(source)) if source[k]["episode"] == 1]
    assert [step["step"] for step in steps] == list(range(note.steps))
    with Tabletop(CONFIG.image_size) as env:
        observation = env.reset(note.task, note.trial)
        for step in steps:
            np.testing.assert_allclose(step["proprio"], observation.proprio)
            picture = decode_image(step["images"]["front"], CONFIG.image_size).astype(int)
            assert np.abs(picture - observation.images[0]).mean() < 4  # JPEG
            assert step["instruction"].decode() == observation.instruction
            observation, done = env.step(step["executed"])
        assert done == note.success
    strays = [not np.array_equal(step["executed"], step["action"]) for step in steps]
    assert not all(strays)


def up_policy():
    """Always up; counts its decisions, to show that its memory is kept."""

    def act(observations, memory, first):
        count = np.where(first, 0, memory) + 1
        actions = np.zeros((1, 1, 7), np.float32)
        actions[..., 2], actions[..., 5] = 1, count / 100
        return Acted(actions, memory=count)

    return RobotPolicy(lambda batch: np.full(batch, 50), act)


@simulated
def test_a_policy_and_the_expert_move_by_turns_and_the_expert_labels():
    config = replace(CONFIG, policy_share=1.0)
    with Tabletop(config.image_size) as env:
        steps, done = record_episode(env, 0, 3, 0, config, up_policy())
        observation, ups = env.reset(0, 3), []
        for step in steps:
            wanted = expert_action(TabletopState.unpack(observation.state))
            np.testing.assert_array_equal(step.action, wanted)
            up = step.executed[5] > 0 and step.executed[2] == 1
            if up:
                ups.append(round(100 * step.executed[5]))
            else:
                np.testing.assert_array_equal(step.executed, wanted)
            observation, ended = env.step(step.executed)
        assert ended == done
    assert ups == list(range(1, len(ups) + 1))
    assert 4 <= len(ups) < len(steps)
    assert steps[0].executed[2] == 1


@simulated
def test_what_a_policy_moved_is_another_set(recorded, tmp_path):
    config = replace(CONFIG, policy_share=0.5, policy="up")
    found = record_demonstrations(tmp_path / "a", config, 2, False, up_policy)
    assert found.digest != recorded.digest
    with pytest.raises(UserError, match="needs a policy"):
        record_demonstrations(tmp_path / "c", config, 1, False)
    with pytest.raises(UserError, match="policy_share=2"):
        replace(CONFIG, policy_share=2)


@simulated
def test_the_bytes_do_not_depend_on_the_processes_or_on_a_kill(recorded, tmp_path, monkeypatch):
    # Killed at the third shard: the first is kept, and two processes write the others, also the
    # second, whose note does not say that it is whole.
    write, calls = demonstrations.write_shard, []

    def killed(job, folder):
        calls.append(job.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(job, folder)

    monkeypatch.setattr(demonstrations, "write_shard", killed)
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        record_demonstrations(out, CONFIG, progress=False)
    assert not out.exists()
    monkeypatch.undo()
    first = next((tmp_path / "again.building").glob("*train*-00000-*"))
    written = first.stat().st_mtime_ns
    (tmp_path / "again.building" / "notes" / f"{calls[1]}.json").write_text("{}")
    again = record_demonstrations(out, CONFIG, workers=2, progress=False)
    assert (out / first.name).stat().st_mtime_ns == written
    assert again.digest == recorded.digest
    for name in ("manifest.json", "dataset_statistics.json", "features.json"):
        assert (out / name).read_bytes() == (recorded.path / name).read_bytes()
    with pytest.raises(UserError, match="already exists"):
        record_demonstrations(out, CONFIG, progress=False)
    shard = next(out.glob("*val*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=shard.name):
        open_episodes(out)
    with pytest.raises(UserError, match="no whole demonstrations"):
        open_episodes(tmp_path)


@simulated
def test_several_recordings_are_read_as_one(recorded, tmp_path, monkeypatch):
    other = record_demonstrations(tmp_path / "other", replace(CONFIG, seed=1), 1, False)
    monkeypatch.chdir(tmp_path)  # a folder may be named from where the reader stands
    both = open_together([recorded.path, other.path.relative_to(tmp_path)])
    assert both.steps("train") == recorded.steps("train") + other.steps("train")
    source, parts = StepSource(both, "train"), [StepSource(recorded, "train")]
    parts.append(StepSource(other, "train"))
    steps = [part[k] for part in parts for k in range(len(part))]
    assert len(source) == len(steps)
    for k, step in enumerate(steps):
        np.testing.assert_array_equal(source[k]["action"], step["action"])
        assert source[k]["images"]["front"] == step["images"]["front"]
    # Without failures: the notes of both tell whose steps are whose.
    notes = recorded.episodes["train"] + other.episodes["train"]
    good = [np.full(note.steps, note.success) for note in notes]
    wanted = np.stack([s["action"] for s in steps])[np.concatenate(good)]
    found = batches(both, batch_size=1, shuffle=False, num_epochs=1)
    found = np.concatenate([batch["action"][:, 0] for batch in found])
    np.testing.assert_array_equal(found, wanted)
    config = EpisodeLoaderConfig(4)
    digests = [identity(one, "train", config)["data"] for one in (both, recorded, other)]
    assert len(set(digests)) == 3
    assert open_together([recorded.path]) == recorded
    smaller = replace(CONFIG, image_size=(24, 24))
    record_demonstrations(tmp_path / "smaller", smaller, 1, False)
    with pytest.raises(UserError, match=r"smaller.*image_size are \(32, 48\) and \(24, 24\)"):
        open_together([other.path, tmp_path / "smaller"])


@simulated
def test_chunks_are_the_actions_that_follow_and_end_with_the_last(recorded):
    (batch,) = taken(iter(batches(recorded, shuffle=False, chunk=5, segments=True)), 1)
    source = StepSource(recorded, "train")
    actions = np.stack([source[k]["action"] for k in range(recorded.episodes["train"][0].steps)])
    padded = np.concatenate([actions, np.repeat(actions[-1:], 5, 0)])
    for k in range(4):
        np.testing.assert_array_equal(batch["action"][k], padded[k : k + 5])
    assert batch["image"].shape == (4, 2, 32, 48, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["proprio"].shape == (4, 8)
    assert batch["segments"].shape == (4, 2, 32, 48)
    assert set(np.unique(batch["segments"])) <= set(range(len(SEGMENTS)))
    last = len(actions) - 1
    ends = taken(iter(batches(recorded, shuffle=False, chunk=5, batch_size=1)), last + 1)[-1]
    np.testing.assert_array_equal(ends["action"][0], np.repeat(actions[-1:], 5, 0))


@simulated
def test_an_epoch_has_each_step_once_and_goes_on_where_it_stopped(recorded):
    whole = list(batches(recorded, num_epochs=1, batch_size=3))
    keys = [tuple(k) for b in whole for k in np.stack([b["episode"], b["step"]], 1).tolist()]
    assert len(set(keys)) == len(keys) > recorded.steps("train") - 60
    assert keys != sorted(keys)
    iterator = iter(batches(recorded, batch_size=3))
    taken(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = taken(iterator, 2)
    resumed = iter(batches(recorded, batch_size=3))
    resumed.set_state(state)
    for a, b in zip(ahead, taken(resumed, 2), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    stream = identity(recorded, "train", EpisodeLoaderConfig(3))
    assert stream == identity(recorded, "train", EpisodeLoaderConfig(8, num_workers=2))
    assert stream != identity(recorded, "train", EpisodeLoaderConfig(3, seed=1))
    # Two hosts share what one host has.
    config = EpisodeLoaderConfig(3, read_threads=1)
    one = next(iter(make_episode_loader(recorded, "train", EpisodeLoaderConfig(6))))
    two = [next(iter(make_episode_loader(recorded, "train", config, k, 2))) for k in range(2)]
    np.testing.assert_array_equal(one["action"], np.concatenate([part["action"] for part in two]))


@simulated
def test_views_sizes_and_instructions_can_be_chosen(recorded):
    (batch,) = taken(iter(batches(recorded, views=("wrist",), image_size=(28, 28))), 1)
    assert batch["image"].shape == (4, 1, 28, 28, 3)
    assert (
        recorded.instructions[batch["instruction"][0]] == TASKS[batch["instruction"][0]].instruction
    )
    with pytest.raises(UserError, match="no view top"):
        batches(recorded, views=("top",))
    with pytest.raises(UserError, match="no split 'test'"):
        make_episode_loader(recorded, "test", EpisodeLoaderConfig(1))
    with pytest.raises(UserError, match="fewer than one batch"):
        batches(recorded, batch_size=100_000)
