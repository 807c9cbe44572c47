"""One job of the demo in a process of its own: trains an adapter if asked, then answers the sealed questions with it.

    python -m scripts.demo_parts.job JOB.json

JOB.json holds a `Job`. Progress goes to standard output as one JSON object a line, everything else into the job's
folder: adapter/, answers.json, result.json. Not here: scoring, and running jobs side by side (`pool`).
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BATCH = 48  # questions answered together: their pictures are encoded once
LONGEST = 24  # tokens of an answer; the references are single words or short phrases


@dataclass(frozen=True)
class Job:
    """What to do. `train` holds the folders to train on; without it `adapter` (or the bare base) answers.

    `rows` are LLaVA JSON files to answer, `pictures` [path of a DICOM or image, question] pairs asked besides.
    """

    name: str
    folder: str
    base: str
    bits: int
    rows: list[str]
    train: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    pictures: list[list[str]] = field(default_factory=list)

    def write(self) -> Path:
        """Save the job in its folder; returns the file."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        return path


def run(job: Job) -> dict[str, Any]:
    """Do the job; returns what result.json says. Raises what training and loading raise."""
    start, before = time.monotonic(), time.process_time()
    import torch

    torch.set_num_threads(1)
    trained: dict[str, Any] = {}
    adapter = Path(job.adapter) if job.adapter else None
    if job.train:
        adapter = Path(job.folder) / "adapter"
        trained = train(job, adapter)
    answered = answer(job, adapter)
    result = {"name": job.name, "seconds": round(time.monotonic() - start, 2), "train": trained, **answered}
    result |= {"cpu_seconds": round(time.process_time() - before, 2), "peak_memory_mib": round(peak_mib(), 1)}
    (Path(job.folder) / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Train one adapter on all folders of the job with the clinics' own trainer and save it.

    What a clinic keeps sealed for examining releases is left out here, too: all adapters learn from the same pictures.
    """
    from client import sealed, trainer
    from model import adapters, data, llava

    s = job.settings
    samples = []
    for place in map(Path, job.train):
        samples += sealed.open_to_training(place.parent, data.read_training(place))
    base = Path(job.base)
    state = adapters.initial(base, s["rank"], s["alpha"], s["targets"], s["adapter_seed"])
    done = trainer.train(
        samples,
        base,
        state,
        ("A", "B"),
        s["steps"],
        lr=s["lr"],
        batch=s["batch"],
        alpha=s["alpha"],
        seed=s["order_seed"],
        bits=job.bits,
        threads=1,
        progress=lambda step, steps, loss: say("trains", step, steps),
    )
    adapters.save(folder, done.state, adapters.spec_of(done.state, s["alpha"], llava.base_sha256(base)))
    losses = {"loss_before": done.loss_before, "loss_after": done.loss_after}
    return {"samples": done.examples, "steps": done.steps, "seconds": done.seconds, **losses}


def answer(job: Job, adapter: Path | None) -> dict[str, Any]:
    """Answer all rows and pictures of the job at its bits; writes answers.json: id -> what `Answer` holds."""
    from model import data, evaluate
    from model.backends import Request, TorchBackend

    samples = [row for path in job.rows for row in data.read(Path(path))]
    backend = TorchBackend(Path(job.base), job.bits, adapter)
    start = time.monotonic()
    answers: dict[str, Any] = {}
    for finished in evaluate.answer_batches(backend, samples, BATCH, max_new_tokens=LONGEST):
        answers |= {samples[place].id: asdict(found) for place, found in finished}
        say("answers", len(answers), len(samples))
    seconds = time.monotonic() - start
    (Path(job.folder) / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    asked: list[dict[str, Any]] = []
    for path, question in job.pictures:
        from model import images

        request = Request(images.read(Path(path)).rgb, question)
        found = next(item[1] for item in backend.generate([request]) if isinstance(item, tuple))
        asked.append({"picture": Path(path).name, "question": question, "answer": found.text})
        asked[-1] |= {"confidence": round(found.confidence, 4), "seconds": round(found.seconds, 3)}
    rest: dict[str, Any] = {"base_sha256": backend.loaded.base_sha256, "adapter_sha256": backend.adapter_sha256}
    rest |= {"reason": backend.reason, "answer_seconds": round(seconds, 2)}
    return {"rows": len(samples), "pictures": asked, **rest}


def say(what: str, done: int, total: int) -> None:
    """One line of progress for the parent."""
    print(json.dumps({"what": what, "done": done, "total": total}), flush=True)


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


def main(arguments: Sequence[str]) -> None:
    """Read the job named on the command line and do it."""
    run(Job(**json.loads(Path(arguments[0]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(sys.argv[1:])
