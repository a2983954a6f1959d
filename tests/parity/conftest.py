"""PyTorch beside JAX on few cores."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing of more, and threads that wait for work use the CPUs, too."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
