"""Memory and speed of one model at one precision, in a process of its own: `python -m model.measure PLAN.json`.

Static memory is the weights as they lie in memory; dynamic memory is the peak while one question is answered, weights
included: the allocator's on CUDA, the whole process on a CPU (see `model.memory`). Questions are asked one by one, as
a clinician does; the first answer after loading is reported apart ("cold"). Answers are written as JSON lines with the
keys of the original system's hardware script (inference_time, tokens_generated, memory_usage in GiB) and ours beside.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model import memory

GIB = 2**30
ANSWERS, RESULT = "answers.jsonl", "result.json"


@dataclass(frozen=True)
class Plan:
    """What to measure; paths as text, `data` empty for synthetic radiographs."""

    model: str
    backend: str
    bits: int
    out: str
    data: str = ""
    images: str = ""
    adapter: str = ""
    device: str = ""
    limit: int = 20
    max_new_tokens: int = 64


def questions(plan: Plan) -> list[Any]:
    """The first `limit` rows of the data, or as many questions about synthetic radiographs."""
    from model import data, phantoms

    if plan.data:
        return data.read(Path(plan.data), Path(plan.images) if plan.images else None)[: plan.limit]
    looks = [name for name, scanner in phantoms.SCANNERS.items() if scanner.standard]
    return phantoms.make(max(1, plan.limit // 6 + 1), looks, seed=4_001)[: plan.limit]


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Load, ask, and yield one row for each answer; the last one holds the result. Raises as loading does."""
    from model import data
    from model.backends import Request
    from model.select import open_backend

    samples = questions(plan)
    before, began = memory.resident_bytes(), time.perf_counter()
    adapter = Path(plan.adapter) if plan.adapter else None
    backend = open_backend(plan.backend, Path(plan.model), plan.bits, adapter, plan.device or None)
    loading = {"seconds": time.perf_counter() - began, "resident_bytes": memory.resident_bytes() - before}
    meter, rows = _energy(), []
    for number, sample in enumerate(samples):
        request = Request(data.load_rgb(sample), sample.question, sample.history, plan.max_new_tokens)
        joules = meter()
        answer = next(item[1] for item in backend.generate([request]) if isinstance(item, tuple))
        used = None if joules is None else (meter() or joules) - joules
        rows.append(_row(sample, answer, backend.static_bytes, warm=number > 0, joules=used))
        yield rows[-1]
    yield {"result": summary(plan, rows, backend.static_bytes, loading, backend.reason)}


def _row(sample: Any, answer: Any, static: int, *, warm: bool, joules: float | None) -> dict[str, Any]:
    return {
        "question_id": sample.id,
        "prompt": "<image>\n" + sample.question,
        "text": answer.text,
        "answer_id": uuid.uuid4().hex,
        "model_id": answer.model_id,
        "metadata": {
            "inference_time": answer.seconds,
            "tokens_generated": answer.tokens,
            "memory_usage": answer.peak_bytes / GIB,
            "first_token_time": answer.first_token_seconds,
            "static_bytes": static,
            "peak_bytes": answer.peak_bytes,
            "warm": warm,
            "energy_joules": joules,
            "bits": answer.bits,
            "device": answer.device,
        },
    }


def summary(plan: Plan, rows: Sequence[dict[str, Any]], static: int, loading: dict[str, Any], reason: str) -> Any:
    """Figures over all answers: bytes, seconds, tokens a second after the first one (`original_`: over all seconds)."""
    facts = [row["metadata"] for row in rows]
    warm = [fact for fact in facts if fact["warm"]] or facts
    later = sum(max(0, fact["tokens_generated"] - 1) for fact in warm)
    spent = sum(fact["inference_time"] - fact["first_token_time"] for fact in warm)
    joules = [fact["energy_joules"] for fact in warm if fact["energy_joules"] is not None]
    return {
        **asdict(plan),
        "questions": len(rows),
        "static_bytes": static,
        "load_seconds": loading["seconds"],
        "load_resident_bytes": loading["resident_bytes"],
        "peak_bytes": max(fact["peak_bytes"] for fact in facts),
        "mean_peak_bytes": statistics.fmean(fact["peak_bytes"] for fact in facts),
        "first_token_cold": facts[0]["first_token_time"],
        "first_token_warm": statistics.median(fact["first_token_time"] for fact in warm),
        "tokens_per_second": later / spent if later and spent > 0 else None,
        "original_tokens_per_second": sum(f["tokens_generated"] for f in facts)
        / sum(f["inference_time"] for f in facts),
        "joules_per_question": statistics.fmean(joules) if joules else None,
        "seconds": sum(fact["inference_time"] for fact in facts),
        "reason": reason,
    }


def _energy() -> Any:
    """A function that gives the joules the GPU has used so far, or None where no GPU reports them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except Exception:  # no library, no card, or a card without a counter: all mean that energy is not known
        return lambda: None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000


def main() -> None:
    """Measure the plan in the file given; each answer becomes a line of answers.jsonl and a tick on standard output."""
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    out = Path(plan.out)
    with open(out / ANSWERS, "w", encoding="utf-8") as stream:
        for item in measure(plan):
            if "result" in item:
                (out / RESULT).write_text(json.dumps(item["result"], indent=1) + "\n", encoding="utf-8")
            else:
                stream.write(json.dumps(item, ensure_ascii=False) + "\n")
                stream.flush()
                print("answered", flush=True)


if __name__ == "__main__":
    main()
