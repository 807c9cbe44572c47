"""Checkpoints: what was written is what is read, and anything damaged is skipped with a sentence."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import adapters
from server import checkpoint as store
from server.checkpoint import Contribution, Rejection
from tests.server import fakes


def two_rounds(root: Path) -> list[store.RoundCheckpoint]:
    """Checkpoints of rounds 1 and 2 under `root`."""
    made = []
    for number in (1, 2):
        state = {n: a + np.float32(number) for n, a in fakes.small_state().items()}
        one = replace(
            fakes.first(state),
            round=number,
            updates=number,
            factor="B",
            changed=True,
            accepted=(Contribution("north", 12, 1.0, 0.5, 96, {"loss-after": 1.5}),),
            rejected=(Rejection("south", "non-finite"),),
        )
        one = replace(one, history=(store.summary(one),))
        store.save(root, one)
        made.append(one)
    return made


def test_written_is_read(tmp_path: Path) -> None:
    _, second = two_rounds(tmp_path)
    found, skipped = store.latest(tmp_path)
    assert skipped == [] and found is not None
    assert replace(found, state={}, history=()) == replace(second, state={}, history=())
    assert all(np.array_equal(found.state[name], array) for name, array in second.state.items())


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert store.latest(tmp_path / "never") == (None, [])


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: -(-(folder / name).stat().st_size // 2)]
    )


def _flip(name: str, where: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(where * (len(data) - 2))] ^= 0x10
        (folder / name).write_bytes(data)

    return damage


def _other_round(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "round-00001", folder)


def _edited(folder: Path) -> None:
    record = json.loads((folder / store.MANIFEST).read_text())
    record["accepted"] = []
    (folder / store.MANIFEST).write_text(json.dumps(record))


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"{name} truncated": _cut(name) for name in (store.MANIFEST, adapters.WEIGHTS, adapters.CONFIG)},
    **{f"{name} missing": (lambda f, n=name: (f / n).unlink()) for name in (store.MANIFEST, adapters.WEIGHTS)},
    **{f"manifest bit flipped at {p}": _flip(store.MANIFEST, p) for p in (0.0, 0.2, 0.5, 0.8, 1.0)},
    **{f"weights bit flipped at {p}": _flip(adapters.WEIGHTS, p) for p in (0.0, 0.1, 0.5, 1.0)},
    "manifest empty": lambda folder: (folder / store.MANIFEST).write_bytes(b""),
    "manifest a list": lambda folder: (folder / store.MANIFEST).write_text("[]"),
    "manifest edited": _edited,
    "half renamed": lambda folder: folder.rename(folder.parent / f".{folder.name}.abc.partial"),
    "a copy of another round": _other_round,
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir())[1],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    first, second = two_rounds(tmp_path)
    DAMAGE[kind](tmp_path / "round-00002")
    found, skipped = store.latest(tmp_path)
    assert found is not None and found.round == 1
    assert all(np.array_equal(found.state[name], array) for name, array in first.state.items())
    if kind != "half renamed":
        assert len(skipped) == 1 and "round-00002" in skipped[0] and skipped[0].endswith("The round before it is used.")
    store.save(tmp_path, second)
    again, skipped = store.latest(tmp_path)
    assert again is not None and again.round == 2 and skipped == []
    assert not list(tmp_path.glob("*.partial"))


def test_old_rounds_are_pruned(tmp_path: Path) -> None:
    for number in range(1, 9):
        store.save(tmp_path / "rounds", replace(fakes.first(), round=number), keep=3)
    assert sorted(p.name for p in (tmp_path / "rounds").iterdir()) == ["round-00006", "round-00007", "round-00008"]


def test_arrays_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    bad = fakes.first()
    bad.state[min(bad.state)][0, 0] = np.nan
    with pytest.raises(adapters.AdapterRejected):
        store.save(tmp_path / "rounds", bad)
    assert list((tmp_path / "rounds").iterdir()) == []
