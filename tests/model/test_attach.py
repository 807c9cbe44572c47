"""A failure while an adapter is put beside the base leaves the base answering as before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import attach, llava
from model.backends import Request, TorchBackend
from tests.model.lora import random_adapter


def answer(backend: TorchBackend) -> Any:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    (said,) = [
        item
        for item in backend.generate([Request(picture, "What is it?", max_new_tokens=6)])
        if isinstance(item, tuple)
    ]
    return said[1].text, said[1].confidence


@pytest.mark.parametrize("bits", [4, 32])
def test_a_failed_attachment_leaves_the_base_as_it_was(
    tiny: Path, tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(tiny, bits, device="cpu")
    before = answer(backend)
    adapter = random_adapter(tiny, tmp_path / "adapter", seed=1, scale=3.0)

    def broken(*_: object) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(attach, "_fill", broken)
        with pytest.raises(OSError, match="disk gone"):
            backend.swap_adapter(adapter)
    assert answer(backend) == before
    assert backend.adapter_sha256 is None
    backend.swap_adapter(adapter)
    assert backend.adapter_sha256
    backend.swap_adapter(None)
    assert answer(backend) == before


def test_a_second_adapter_is_not_attached_over_the_first(tiny: Path, tmp_path: Path) -> None:
    loaded = llava.load(tiny, 32, adapter=random_adapter(tiny, tmp_path / "one"), device="cpu")
    with pytest.raises(llava.ModelError, match="swap it"):
        attach.attach(loaded, random_adapter(tiny, tmp_path / "two", seed=2))
