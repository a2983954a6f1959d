"""The page "add a model": its model is written as it stands there, and is pruned by any method."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_openvla import random_params

PAGE = Path(__file__).parents[2] / "docs" / "add_a_model.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    ((name, text),) = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("page") / name
    path.write_text(text)
    return runpy.run_path(str(path))


@pytest.fixture(scope="module")
def given(model):
    params = random_params(jax.eval_shape(model["init"], jax.random.key(0)))
    tokens = np.random.default_rng(1).normal(size=(2, model["VISUAL"], 64)).astype(np.float32)
    return params, tokens, np.arange(10).reshape(2, 5)


@pytest.mark.parametrize(("method", "ratio"), [("fastv", 0.5), ("divprune", 0.25)])
def test_it_is_pruned(model, given, method, ratio):
    run = jax.jit(model["answer"], static_argnums=(3, 4))
    ids, kept = run(*given, method, ratio)
    assert ids.shape == (2, 4)
    assert kept.shape == (2, int(12 * ratio))
    assert (np.diff(kept, axis=1) > 0).all()


def test_all_tokens_kept_is_the_model_unpruned(model, given):
    run = jax.jit(model["answer"], static_argnums=(3, 4))
    ids, kept = run(*given, "divprune", 1.0)
    assert (kept == np.arange(12)).all()
    params, tokens, prompt = given
    decoder = model["DECODER"]

    @jax.jit
    def whole(params, tokens, prompt, ids):
        """The tokens that one pass over everything, without caches, gives where the answer is."""
        text = decoder.apply({"params": params}, jnp.concatenate([prompt, ids], 1), method="embed")
        x = jnp.concatenate([text[:, :1], tokens, text[:, 1:]], axis=1)
        places = jnp.broadcast_to(jnp.arange(x.shape[1]), (3, *x.shape[:2]))
        hidden, _ = decoder.apply({"params": params}, x, places)
        logits = decoder.apply({"params": params}, hidden, method="logits")
        return logits.argmax(-1)[:, -1 - ids.shape[1] : -1]

    assert (ids == whole(params, tokens, prompt, ids)).all()
