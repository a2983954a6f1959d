import subprocess
import sys

from experiments.kill_data import EPOCHS, FAULTS, count_faults
from fastdrive_jax.evaluation.results import read_rows, select


def test_faults_are_counted():
    whole = [*range(5)] * EPOCHS
    assert count_faults(whole, 5) == (0, 0)
    assert count_faults(whole[:-1], 5) == (1, 0)
    assert count_faults([*whole, 3], 5) == (0, 1)
    assert count_faults([0, 1, 2, 3, 3, *whole[5:]], 5) == (1, 1)
    assert count_faults(whole[:4] + whole[5:], 5)[0] > 0  # the epochs shift: much is amiss


def test_killed_builds_and_readers_lose_nothing(tmp_path):
    """In a process of its own: it forks, which a process with threads had better not."""
    command = "from experiments.cli import main; raise SystemExit(main())"
    subprocess.run(
        [sys.executable, "-c", command, "kill-data", "--kills", "24", "--out", str(tmp_path)],
        check=True,
        timeout=200,
    )
    rows, _ = read_rows(tmp_path / "kills.json")
    found = {row.metric: row.value for row in select(rows, method="kill_data")}
    assert (found["kills_of_builds"], found["kills_of_readers"]) == (12, 12)
    assert found["builds"] >= 1
    assert found["epochs_read"] >= EPOCHS
    assert [found[name] for name in FAULTS] == [0, 0, 0, 0]
