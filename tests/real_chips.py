"""Chips whose compilers may be installed; none of the chips need be here."""

import importlib.util

import pytest


def _if_installed(chip: str, modules: tuple[str, ...], extra: str):
    found = any(importlib.util.find_spec(module) for module in modules)
    reason = f"the compiler for a {chip} is not installed (extra: {extra})"
    return pytest.param(chip, marks=pytest.mark.skipif(not found, reason=reason))


TPUS = [_if_installed(chip, ("libtpu",), "tpu") for chip in ("v5e", "v5p", "v6e")]
H100 = _if_installed("h100", ("jax_cuda12_plugin", "jax_cuda13_plugin"), "cuda")
