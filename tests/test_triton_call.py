"""Where Triton kernels run."""

import importlib.util
import types

import jax
import pytest

from pallas_kernels import triton_call


@pytest.mark.parametrize(("capability", "runs"), [("7.5", False), ("8.0", True), ("12.0", True)])
def test_kernels_run_from_ampere_on(monkeypatch, capability, runs):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    reason = triton_call.decline()
    assert reason is None if runs else "from Ampere on" in reason and capability in reason
