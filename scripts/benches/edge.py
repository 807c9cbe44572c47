"""`scripts/bench edge`: answers on a plain computer, beside llama.cpp and beside float32, alternately in one run.

Random weights at a preset's true size: speed and memory do not depend on the values. Each case runs in a process of its
own; figures are medians over the pairs. Accuracy is the divergence (KL) of the last token's probabilities from those of
float32 weights, mean over prompts that are short, so that there can be many, for both engines. llama.cpp comes from its
Python package, in an environment that this script makes beside the results.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

_PATH = click.Path(path_type=Path)
_PEERS = {"4": "q4_0", "8": "q8_0"}
_KERNELS = {
    "avx": "GGML_AVX", "avx2": "GGML_AVX2", "fma": "GGML_FMA", "f16c": "GGML_F16C", "bmi2": "GGML_BMI2",
    "avx_vnni": "GGML_AVX_VNNI", "avx512f": "GGML_AVX512", "avx512_vbmi": "GGML_AVX512_VBMI",
    "avx512vbmi": "GGML_AVX512_VBMI", "avx512_vnni": "GGML_AVX512_VNNI", "avx512_bf16": "GGML_AVX512_BF16",
}  # fmt: skip
_PROMPT = 793  # tokens: a SigLIP picture (729) and 64 of text
_SHORT = 128  # tokens of a prompt that accuracy is compared on


@click.command()
@click.option("--out", type=_PATH, required=True, help="JSON file for the results.")
@click.option("--gpu", is_flag=True, help="The rows of a GPU instead (scripts.benches.edge_gpu); needs 40 GB of disk.")
@click.option("--preset", default="tinyllava-1.5b", show_default=True)
@click.option("--pairs", default=5, show_default=True, help="Times that each engine runs.")
@click.option("--prompts", default=32, show_default=True, help="Short prompts over which accuracy is compared.")
@click.option("--new", default=64, show_default=True, help="Tokens of an answer.")
@click.option("--block", type=click.Choice(["32", "64", "128", "256"]), help="[default: as `quantize` chooses]")
@click.option("--bits", type=click.Choice(["4", "8"]), multiple=True, default=("4", "8"), show_default=True)
@click.option("--peer-python", type=_PATH, help="Python with llama-cpp-python and gguf [default: one is made].")
@click.option("--whole/--decoder-only", default=True, help="Also the whole model, picture to first token.")
@click.option("--data", type=_PATH, help="Also score the trained model on these rows at every bits and backend.")
@click.option("--images", type=_PATH, help="Folder of their pictures.")
@click.option("--trained", type=_PATH, help="The trained model [default: the reference model].")
@click.option("--work", type=_PATH, help="Folder for the models (about 10 GB) [default: a temporary one].")
def main(**options: Any) -> None:
    """Measure the quantized model on this computer's processor beside its peers."""
    with tempfile.TemporaryDirectory() as folder:
        place = options["work"] or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        if options.pop("gpu"):
            from scripts.benches import edge_gpu

            click.echo(edge_gpu.table(edge_gpu.measure(place, options["out"], options["pairs"], options["new"])))
            return
        report = measure(place, **options)
    click.echo(table(report))


def measure(place: Path, out: Path, preset: str, pairs: int, prompts: int, new: int, **options: Any) -> dict[str, Any]:
    """The whole bench; the report is written after every part."""
    from scripts.benches import random_model

    peer = options["peer_python"] or _environment(place)
    if not (place / "model/config.json").is_file():
        random_model.write(preset, None, place / "model")
    for name, shape in (("prompts", (1, _PROMPT)), ("short", (prompts, _SHORT))):
        np.save(place / f"{name}.npy", np.random.default_rng(0).integers(3, 2000, shape))
    report: dict[str, Any] = {"preset": preset, "block": options["block"], "new": new, "decoder": {}, "whole": {}}
    _peer(peer, "--convert", place / "model", "--out", place)
    _ours("reference", place / "model", "--prompts", place / "short.npy", "--logits", place / "fp32.npy")
    for bits in options["bits"]:
        _quantized(place, bits, options["block"])
        report["decoder"][bits] = _decoder(place, peer, bits, pairs, new)
        _save(out, report)
    if options["whole"]:
        report["whole"] = _whole(place, options["bits"], pairs)
        _save(out, report)
    if options["data"]:
        report |= _trained(place, options, pairs)
        _save(out, report)
    return report


def _trained(place: Path, options: dict[str, Any], pairs: int) -> dict[str, Any]:
    """A trained model: accuracy at every bits, the start from cold, and a picture's whole answer."""
    from model.presets import reference_path
    from scripts.benches import edge_accuracy

    model = options["trained"] or reference_path()
    found = edge_accuracy.measure(model, options["data"], options["images"], options["block"], place)
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(pairs):
        for bits in (8, 4):
            folder = edge_accuracy.quantized(model, bits, options["block"], place)
            runs.setdefault(f"onnx, {bits} bits", []).append(_ours("whole", folder, "--new", 16))
            runs.setdefault(f"torch, {bits} bits", []).append(_ours("whole", model, "--bits", bits, "--new", 16))
    return {"accuracy": found, "trained": {name: medians(done) for name, done in runs.items()} | {"runs": runs}}


def _decoder(place: Path, peer: Path, bits: str, pairs: int, new: int) -> dict[str, Any]:
    """Both engines in turn on the decoder alone, and how far each is from float32."""
    ours = ["decoder", place / f"onnx{bits}", "--new", new, "--prompts"]
    theirs = ["--run", place / f"{_PEERS[bits]}.gguf", "--new", new, "--prompts"]
    _ours(*ours, place / "short.npy", "--logits", place / "ours.npy")
    _peer(peer, *theirs, place / "short.npy", "--logits", place / "theirs.npy")
    ours, theirs = [*ours, place / "prompts.npy"], [*theirs, place / "prompts.npy"]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "llama.cpp": []}
    for _ in range(pairs):
        runs["ours"].append(_ours(*ours))
        runs["llama.cpp"].append(_peer(peer, *theirs))
    found: dict[str, Any] = {name: medians(done) for name, done in runs.items()}
    exact = np.load(place / "fp32.npy")
    found["ours"]["kl"] = divergence(exact, np.load(place / "ours.npy"))
    found["llama.cpp"]["kl"] = divergence(exact, np.load(place / "theirs.npy"))
    return found | {"runs": runs}


def _whole(place: Path, bits: tuple[str, ...], pairs: int) -> dict[str, Any]:
    """From a picture to its first token: float32 by PyTorch, then ours."""
    cases: dict[str, list[Any]] = {"float32": [place / "model", "--bits", 32]}
    cases |= {f"{n} bits": [place / f"onnx{n}"] for n in bits}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(max(1, pairs // 2)):
        for name, options in cases.items():
            runs[name].append(_ours("whole", *options, "--times", 2))
    return {name: medians(done) for name, done in runs.items()} | {"runs": runs}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median of each figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def divergence(exact: np.ndarray, found: np.ndarray) -> float:
    """Mean over rows of KL(exact || found) of the softmaxed logits, nats; extra columns of one side are left out."""
    width = min(exact.shape[1], found.shape[1])
    p, q = (_log_softmax(part[:, :width].astype(np.float64)) for part in (exact, found))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    high = logits.max(1, keepdims=True)
    shifted: np.ndarray = logits - high - np.log(np.exp(logits - high).sum(1, keepdims=True))
    return shifted


def _quantized(place: Path, bits: str, block: str | None) -> None:
    command = [sys.executable, "-c", "from model.cli import main; main()", "quantize", str(place / "model")]
    command += ["--backend", "onnx", "--bits", bits, "--out", str(place / f"onnx{bits}")]
    command += ["--block", block] if block else []
    if subprocess.run(command, check=False).returncode:
        raise click.ClickException(f"The model could not be quantized to {bits} bits.")


def _environment(place: Path) -> Path:
    """A Python with llama.cpp, built for this processor; kept in `place`."""
    python = place / "llama/bin/python"
    if not python.exists():
        click.echo("Building llama.cpp in an environment of its own (some minutes)", err=True)
        subprocess.run([sys.executable, "-m", "venv", str(place / "llama")], check=True)
        packages = ["llama-cpp-python", "gguf", "numpy"]
        env = {**os.environ, "CMAKE_ARGS": " ".join(_kernels())}
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, env=env)
    return python


def _kernels() -> list[str]:
    """llama.cpp's build options for this processor, without AMX: many virtual machines name AMX and forbid it."""
    options = ["-DGGML_NATIVE=OFF"]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    here = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return options + [f"-D{option}=ON" for flag, option in _KERNELS.items() if flag in here]


def _ours(*options: Any) -> dict[str, float]:
    return _run([sys.executable, "-m", "scripts.benches.edge_case", *options])


def _peer(python: Path, *options: Any) -> dict[str, float]:
    return _run([python, Path(__file__).with_name("edge_peer.py"), *options])


def _run(command: list[Any]) -> dict[str, float]:
    """One case in a fresh process; the figures it tells, {} for one that tells none."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise click.ClickException(f"{' '.join(words[1:])} failed: {(ran.stderr or ran.stdout)[-1500:]}")
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {}
    if found:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        click.echo(f"{words[-1] if 'whole' in words else words[2:5]}: {shown}", err=True)
    return found


def _save(out: Path, report: dict[str, Any]) -> None:
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| decoder alone | first token s | tokens/s | peak RSS MB | KL to float32 |", "|---|---|---|---|---|"]
    for bits, found in report["decoder"].items():
        for name in ("llama.cpp", "ours"):
            row = found[name]
            label = f"{name} {_PEERS[bits].upper()}" if name == "llama.cpp" else f"{name}, {bits} bits"
            speed = f"{row['first_token_seconds']:.2f} | {row['tokens_per_second']:.1f}"
            lines.append(f"| {label} | {speed} | {row['peak_rss_mb']:.0f} | {row['kl']:.4f} |")
    if report["whole"]:
        lines += ["", "| picture to first token | s | peak RSS MB |", "|---|---|---|"]
        rows = {name: row for name, row in report["whole"].items() if name != "runs"}
        lines += [f"| {n} | {r['first_token_seconds']:.2f} | {r['peak_rss_mb']:.0f} |" for n, r in rows.items()]
    if "accuracy" in report:
        from scripts.benches import edge_accuracy

        lines += edge_accuracy.table(report["accuracy"])
        lines += ["", "| trained model | start s | first answer s | answer s |", "|---|---|---|---|"]
        for name, row in report["trained"].items():
            if name != "runs":
                first = f"{row['open_seconds']:.2f} | {row['cold_answer_seconds']:.2f}"
                lines.append(f"| {name} | {first} | {row['answer_seconds']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
