"""A kiosk that is started anew answers with the adapter that answered before, where the one installed is refused."""

from pathlib import Path

from kiosk.adapter_watch import AdapterWatch
from model import adapters, installed
from model.backends import TorchBackend
from tests.kiosk.test_adapter_watch import OTHER, put, trust


def test_after_a_new_start_the_last_good_one_answers_where_a_release_is_refused(
    afya_home: Path, tmp_path: Path, tiny: Path
) -> None:
    trust(afya_home)
    first = put(afya_home, tmp_path, tiny, 1)
    AdapterWatch(afya_home).refresh(TorchBackend(tiny, 4, device="cpu"))
    put(afya_home, tmp_path, tiny, 2, OTHER)
    again = AdapterWatch(afya_home)
    fresh = TorchBackend(tiny, 4, device="cpu")
    again.refresh(fresh)
    assert again.name == first and again.adapter == afya_home / "verified" / first
    assert fresh.adapter_sha256 == adapters.sha256(afya_home / "adapters" / first)
    assert f"the earlier one ({first}) answers instead" in (again.notice or "")
    weights = afya_home / "verified" / first / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # the copy is not what answered: the bare model
    damaged = AdapterWatch(afya_home)
    damaged.refresh(TorchBackend(tiny, 4, device="cpu"))
    assert damaged.name is None and "the model as it was installed answers" in (damaged.notice or "")


def test_the_bare_model_stays_after_a_new_start_when_somebody_went_back_to_it(
    afya_home: Path, tmp_path: Path, tiny: Path
) -> None:
    trust(afya_home)
    put(afya_home, tmp_path, tiny, 1)
    watch, backend = AdapterWatch(afya_home), TorchBackend(tiny, 4, device="cpu")
    watch.refresh(backend)
    installed.rollback(afya_home)
    watch.refresh(backend)
    assert watch.name is None
    put(afya_home, tmp_path, tiny, 2, OTHER)
    again = AdapterWatch(afya_home)
    again.refresh(TorchBackend(tiny, 4, device="cpu"))
    assert again.name is None
