"""Settings: one table, the same in pyproject.toml; every fault is told at once."""

import tomllib

import pytest

from server import settings
from server.settings import SettingsRejected
from tests.conftest import REPOSITORY


def test_pyproject_holds_the_defaults_of_the_table() -> None:
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert config == {name: default for name, (default, _) in settings.names().items()}


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(SettingsRejected) as caught:
        settings.read({"rank": 0, "lr": "fast", "path": "/etc", "local-steps": True})
    for word in ("rank = 0", "lr = 'fast'", "path is not a setting", "local-steps = True", "checkpoint-dir is empty"):
        assert word in str(caught.value)


def test_whole_numbers_are_taken_where_a_fraction_is_meant() -> None:
    assert settings.read({"checkpoint-dir": "/x", "alpha": 8}).alpha == 8.0
