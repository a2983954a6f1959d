"""Batched inference over processes that simulate: memory, batches, chunks, and what goes wrong."""

import collections

import numpy as np
import pytest
from robot_fakes import COMPLAINS, DIES, FAILS, MAX_STEPS, counting_suite, remembering_policy

from data_pipelines.robot.policies import Acted, Observation, RobotPolicy, random_policy
from data_pipelines.robot.worker import Job
from data_pipelines.robot.workers import ENVIRONMENT, POLICY, run_episodes
from fastdrive_jax.errors import UserError

JOBS = [Job(task, trial, film=trial == 0) for task in range(4) for trial in range(2)]


def run(jobs, policy, workers, batch):
    return list(run_episodes(counting_suite(), jobs, policy, workers, batch))


@pytest.fixture(scope="module")
def log():
    return []


@pytest.fixture(scope="module")
def episodes(log):
    return run(JOBS, remembering_policy(log=log), 3, 2)


def test_every_episode_comes_once_and_ends_as_it_must(episodes):
    found = {(e.task, e.trial): e for e in episodes}
    assert sorted(found) == [(job.task, job.trial) for job in JOBS]
    for (task, _), episode in found.items():
        assert episode.success == (task < 3)
        assert episode.steps == (3, 5, 7, MAX_STEPS)[task] == episode.decisions
        assert episode.seconds["prefill"] == pytest.approx(0.5 * episode.decisions)
        assert episode.seconds["decode"] == sum(range(1, episode.decisions + 1))
        assert {ENVIRONMENT, POLICY} < set(episode.seconds)


def test_memory_follows_its_episode_whichever_batch_it_is_in(episodes):
    for episode in episodes:
        if episode.film is not None:
            counted = [int(kept[0]) for kept in episode.film.kept]
            assert counted == list(range(1, episode.decisions + 1))


def test_batches_have_one_size(episodes, log):
    assert set(log) == {2}


def test_films_hold_every_frame(episodes):
    assert {(e.task, e.trial) for e in episodes if e.film} == {(task, 0) for task in range(4)}
    for episode in episodes:
        if episode.film is not None:
            assert episode.film.frames.shape == (episode.steps + 1, 2, 16, 16, 3)
            np.testing.assert_array_equal(
                episode.film.frames[:, 0, 0, 0, 0], np.arange(episode.steps + 1)
            )
            assert episode.film.decisions == tuple(range(episode.steps))


def test_chunks_are_executed_open_loop_up_to_the_end():
    (episode,) = run([Job(1, 0, film=True)], remembering_policy(chunk=2), 1, 1)
    assert (episode.steps, episode.decisions, episode.success) == (5, 3, True)
    assert episode.film.decisions == (0, 2, 4)
    (endless,) = run([Job(3, 0)], remembering_policy(chunk=2), 1, 1)
    assert (endless.steps, endless.decisions, endless.success) == (MAX_STEPS, 5, False)


def test_a_worker_that_dies_is_named_and_finished_episodes_are_kept():
    finished, jobs = [], [Job(0, 0), Job(0, 1), Job(2, DIES)]
    episodes = run_episodes(counting_suite(), jobs, remembering_policy(), 1, 1)
    with pytest.raises(UserError, match=rf"task 2 \(count to 7\), trial {DIES}, seed 4.*code 3"):
        collections.deque(map(finished.append, episodes))
    assert [(e.task, e.trial, e.success) for e in finished] == [(0, 0, True), (0, 1, True)]


def test_a_simulation_that_fails_is_named_with_its_trace():
    with pytest.raises(RuntimeError, match=r"(?s)trial 14.*the arm fell off"):
        run([Job(1, FAILS)], remembering_policy(), 1, 1)


def test_a_persons_mistake_stays_one_sentence():
    with pytest.raises(UserError, match=r"^Oil the arm\.$"):
        run([Job(1, COMPLAINS)], remembering_policy(), 1, 1)


@pytest.mark.parametrize(
    ("actions", "named"),
    [(np.zeros((1, 7)), "must be"), (np.full((1, 1, 7), np.nan), "not finite")],
)
def test_senseless_actions_are_refused(actions, named):
    policy = RobotPolicy(lambda batch: None, lambda o, memory, first: Acted(actions))
    with pytest.raises(UserError, match=named) as told:
        run([Job(0, 0)], policy, 1, 1)
    assert "for counting, task 0 (count to 3), trial 0, seed 4; " in str(told.value)


def test_of_a_batch_the_episode_with_senseless_actions_is_named():
    def act(observations, memory, first):
        trials = np.array([one.proprio[1] for one in observations])
        actions = np.zeros((2, 1, 7)) + np.where(trials == 1, np.inf, 0)[:, None, None]
        return Acted(actions, memory=memory)

    with pytest.raises(UserError, match=r"not finite for counting, task 3 .*, trial 1, seed 4"):
        run([Job(3, 0), Job(3, 1)], RobotPolicy(lambda batch: None, act), 2, 2)


def test_a_batch_larger_than_the_team_is_refused():
    with pytest.raises(UserError, match="batch=3"):
        run(JOBS, remembering_policy(), 2, 3)


def test_random_actions_do_not_depend_on_the_batch():
    def seen(k):
        return Observation(np.full((1, 4, 4, 3), k, np.uint8), np.zeros(8, np.float32), "", 2)

    policy, both = random_policy(5, chunk=3), [seen(0), seen(1)]
    actions = policy.act(both, None, np.zeros(2, bool)).actions
    assert actions.shape == (2, 3, 7)
    assert (np.abs(actions) <= 1).all()
    assert not np.array_equal(actions[0], actions[1])
    swapped = policy.act(both[::-1], None, np.zeros(2, bool)).actions
    np.testing.assert_array_equal(actions, swapped[::-1])
    other = random_policy(6, chunk=3).act(both, None, np.zeros(2, bool)).actions
    assert not np.array_equal(actions, other)
