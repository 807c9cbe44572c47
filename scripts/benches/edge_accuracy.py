"""The accuracy rows of `scripts/bench edge`: a trained model at every bits and backend on one dataset.

Each row is scored strictly (`model.metrics`) with its interval, and held against the float32 answers: how many became
wrong (lost) and right (gained).
"""

from pathlib import Path
from typing import Any

from model import evaluate, quantize

ROWS = (("torch", 32), ("torch", 8), ("torch", 4), ("onnx", 8), ("onnx", 4))


def measure(model: Path, data: Path, images: Path | None, block: str | None, place: Path) -> dict[str, Any]:
    """Percent right with its interval for each row, and the flips against float32."""
    found: dict[str, Any] = {}
    exact = place / "accuracy-torch32" / evaluate.ANSWERS
    for backend, bits in ROWS:
        folder = quantized(model, bits, block, place) if backend == "onnx" else model
        out = place / f"accuracy-{backend}{bits}"
        compare = None if bits == 32 else exact
        settings = evaluate.Settings(folder, data, out, bits, images, device="cpu", compare=compare)
        report = evaluate.run(settings)
        scores = report["scores"]["all"]
        found[f"{backend}, {bits} bits"] = {**scores, **_flips(report.get("flips"))}
    return found


def quantized(model: Path, bits: int, block: str | None, place: Path) -> Path:
    """The model as ONNX graphs; made once."""
    out = place / f"trained-onnx{bits}"
    if not out.exists():
        quantize.quantize(model, out, quantize.plan(bits, int(block) if block else None))
    return out


def _flips(flips: dict[str, Any] | None) -> dict[str, Any]:
    return {} if flips is None else {name: flips[name] for name in ("lost", "gained", "changed")}


def table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = ["", "| trained model | right % | 95 % interval | lost | gained |", "|---|---|---|---|---|"]
    for name, row in found.items():
        flips = f"{row.get('lost', '')} | {row.get('gained', '')}"
        lines.append(f"| {name} | {row['percent']:.1f} | {row['low']:.1f} to {row['high']:.1f} | {flips} |")
    return lines
