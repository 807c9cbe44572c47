"""What fits a machine: the sums agree with what real processes take, and more memory never means less."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from model import plan, presets, sizes
from model.backends import KEEP_BYTES
from model.plan_cli import plan as command
from model.presets import reference_path

CONFIG = json.loads((reference_path() / "config.json").read_text())
SMALL = presets.architecture(presets.preset("tinyllava-1.5b"))
LARGE = presets.architecture(presets.preset("llava-med-v1.5-7b"))
assert SMALL is not None and LARGE is not None

MEASURE = """
import json, sys
sys.modules["triton"] = None  # comes with CUDA builds of torch and with the tests' tools, not with a clinic's CPU
import numpy as np
from pathlib import Path
from model import memory
from model.backends import Request, TorchBackend
backend = TorchBackend(Path(sys.argv[1]), int(sys.argv[2]), device="cpu")
memory.reset_highest()
list(backend.generate([Request(np.zeros((300, 300, 3), np.uint8), "What is it?", max_new_tokens=4)]))
cache = backend.kept
print(json.dumps({"peak": memory.highest_resident_bytes(), "kept": cache.bytes,
    "tokens": sum(len(key[1]) for key in cache._entries)}))
"""


@pytest.mark.parametrize("bits", [16, 4])
def test_a_real_process_stays_under_what_was_planned(bits: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(reference_path()), str(bits)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    one = plan.choice("reference", CONFIG, bits, "cpu", plan.GIB * 4, kiosk=False)
    planned = one.needed - plan.SYSTEM_BYTES - KEEP_BYTES
    assert 0.7 * planned < found["peak"] <= planned
    assert found["kept"] == found["tokens"] * plan.cache_bytes_per_token(CONFIG, 2 if bits == 16 else 4)


def test_a_model_of_true_size_stays_under_what_was_planned() -> None:
    """Peaks of one answer measured on two x86-64 cores with random weights of TinyLLaVA-1.5B, in MiB."""
    for bits, peak in ((4, 2802), (8, 2851)):
        one = plan.choice("x", SMALL, bits, "cpu", 8 * plan.GIB, kiosk=False)
        assert peak <= (one.needed - plan.SYSTEM_BYTES - KEEP_BYTES) / plan.MIB <= 1.2 * peak


def test_the_parts_are_those_of_the_published_shapes() -> None:
    """By hand: 22 layers of 4 heads of 64, keys and values, two bytes; 27 times 27 patches."""
    assert plan.cache_bytes_per_token(SMALL, 2) == 22 * 4 * 64 * 2 * 2 == 22528
    assert plan.cache_bytes_per_token(LARGE, 2) == 32 * 8 * 128 * 2 * 2
    assert (plan.image_tokens(SMALL), plan.image_tokens(LARGE)) == (729, 576)
    assert (plan.positions(SMALL), plan.positions(LARGE), plan.positions(CONFIG)) == (2048, 32768, 512)
    one = plan.choice("x", SMALL, 4, "gpu", 6 * plan.GIB)
    assert one.weights == sizes.static_bytes(SMALL, 4) and one.fits and one.context == 2048


def test_more_memory_never_fits_less_and_the_border_is_exact() -> None:
    for device in ("gpu", "cpu"):
        contexts = [plan.choice("x", LARGE, 4, device, int(g * plan.GIB)).context for g in range(1, 24)]
        assert contexts == sorted(contexts) and contexts[0] == 0 and contexts[-1] > 3000
        needed = plan.choice("x", LARGE, 4, device, plan.GIB).needed
        assert plan.choice("x", LARGE, 4, device, needed).fits
        assert not plan.choice("x", LARGE, 4, device, needed - 1).fits


def test_the_first_choice_is_the_gpu_and_the_most_bits() -> None:
    first = {one.model: one for one in plan.best(plan.plan(16, 6))}
    assert (first["tinyllava-1.5b"].device, first["tinyllava-1.5b"].bits) == ("gpu", 16)
    assert (first["llava-med-v1.5-7b"].device, first["llava-med-v1.5-7b"].bits) == ("gpu", 4)
    without = {one.model: one for one in plan.best(plan.plan(4))}
    assert "llava-med-v1.5-7b" not in without and without["reference"].device == "cpu"


def test_the_command_prints_reasons_and_json() -> None:
    told = CliRunner().invoke(command, ["--ram", "8", "--gpu", "6"])
    assert told.exit_code == 0 and "llava-med-v1.5-7b gpu   4 bits  fits" in told.output
    assert "needs" in told.output and "tokens/s" not in told.output
    found = json.loads(CliRunner().invoke(command, ["--ram", "2", "--json"]).output)
    assert all(not one["fits"] and one["context"] == 0 for one in found["all"] if one["model"] == "llava-med-v1.5-7b")
    assert found["best"] and found["measured"]["process_bytes"] == plan.PROCESS_BYTES
    for wrong in (["--ram", "0"], ["--ram", "4", "--gpu", "-1"], ["--ram", "nan"]):
        refused = CliRunner().invoke(command, wrong)
        assert refused.exit_code == 2 and "--ram takes" in refused.output


def test_a_model_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "_HERE", tmp_path)
    assert "reference" not in {one.model for one in plan.plan(8)}
