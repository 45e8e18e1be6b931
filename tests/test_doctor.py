"""What the doctor finds: a kernel that is said to run runs, and reasons are given for the others."""

import jax
import pytest

from minikv_jax import doctor
from minikv_jax.models import hub


def test_every_operation_runs_somewhere_and_others_say_why():
    found = doctor.examine()
    assert jax.devices()[0].device_kind in found.device and found.versions["jax"] == jax.__version__
    for reasons in found.kernels.values():
        assert reasons["xla"] is None
        assert all(reason is None or len(reason) > 10 for reason in reasons.values())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there they run")
def test_without_a_gpu_its_kernels_say_so():
    for reasons in doctor.examine().kernels.values():
        assert all("GPU" in reason for name, reason in reasons.items() if name != "xla")


def test_weights_are_looked_for_and_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIKV_MODELS", str(tmp_path))
    monkeypatch.setattr(hub, "_installed", lambda model: None)
    assert doctor.examine().models == {"smollm2": None} and list(tmp_path.iterdir()) == []


def test_packages_that_are_not_there_are_none(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
    assert doctor.examine().versions["no-such-package"] is None
