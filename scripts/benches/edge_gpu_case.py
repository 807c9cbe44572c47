"""One model of the GPU bench in a process of its own: prints a JSON line.

`pairs`: ours and transformers' `generate` with bitsandbytes, as the original answers, in turn on the same question.
`doctors`: one and several people who ask our backend one question after another. `memory`: what one loaded model and
its answer take of the GPU's allocator. `swap`: another adapter while the model runs.
"""

import json
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import click
import numpy as np

_PATH = click.Path(path_type=Path)
GIB = 2**30


@click.group()
def main() -> None:
    """Cases of the GPU bench."""


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--bits", default=4)
@click.option("--pairs", "count", default=5)
@click.option("--new", default=64, help="Tokens of an answer.")
def pairs(folder: Path, bits: int, count: int, new: int) -> None:
    """First token and tokens/s of both, alternately."""
    ours, theirs = _Ours(folder, bits), _Peer(folder, bits)
    for engine in (ours, theirs):
        for _ in range(2):  # compiles, records and fills caches
            engine.answer(new)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for _ in range(count):
        runs["ours"].append(ours.answer(new))
        runs["transformers"].append(theirs.answer(new))
    found = {name: _medians(done) for name, done in runs.items()}
    _told(found | {"runs": runs, "reason": ours.backend.reason})


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--bits", default=4)
@click.option("--engine", type=click.Choice(["ours", "transformers"]), default="ours")
@click.option("--new", default=64)
def memory(folder: Path, bits: int, engine: str, new: int) -> None:
    """Static and peak GiB of one question, and the seconds until the first answer."""
    import torch

    began = time.perf_counter()
    made: Any = _Ours(folder, bits) if engine == "ours" else _Peer(folder, bits)
    opened, static = time.perf_counter() - began, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    made.answer(new)
    first, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made.answer(new)
    warm = torch.cuda.max_memory_allocated()
    _told(
        {
            "open_seconds": opened, "first_answer_seconds": first, "static_gib": static / GIB, "peak_gib": peak / GIB,
            "warm_peak_gib": warm / GIB,
        }
    )  # fmt: skip


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--bits", default=4)
@click.option("--people", default=8)
@click.option("--questions", default=6, help="Questions of each person in a round.")
@click.option("--rounds", default=5)
@click.option("--new", default=64)
@click.option("--seen/--unseen", default=True, help="Whether pictures were chosen (and looked at) before asking.")
def doctors(folder: Path, bits: int, people: int, questions: int, rounds: int, new: int, seen: bool) -> None:
    """Tokens/s and the wait for the first token, one person and several alternately."""
    ours = _Ours(folder, bits, keep=8 * 2**30 if seen else 0)
    crowd = _Crowd(ours, questions, new, seen)
    crowd.run(people), crowd.run(1)
    done: dict[int, list[dict[str, float]]] = {1: [], people: []}
    for _ in range(rounds):
        for size, runs in done.items():
            runs.append(crowd.run(size))
    one, many = (_medians(runs) for runs in done.values())
    _told({"one": one, "many": many, "people": people, "runs": {str(size): runs for size, runs in done.items()}})


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--bits", default=4)
@click.option("--times", default=5)
@click.option("--new", default=64)
def swap(folder: Path, bits: int, times: int, new: int) -> None:
    """Seconds to put an adapter (rank 16, all linear layers of the decoder) beside the model, and tokens/s with it."""
    with tempfile.TemporaryDirectory() as place:
        adapter = _adapter(folder, Path(place) / "adapter")
        ours = _Ours(folder, bits)
        bare = [ours.answer(new) for _ in range(times)][1:]
        swaps, answers, adapted = [], [], []
        for turn in range(2 * times):
            began = time.perf_counter()
            ours.backend.swap_adapter(None if turn % 2 else adapter)
            swaps.append(time.perf_counter() - began)
            ours.answer(new)
            answers.append(time.perf_counter() - began)
            if not turn % 2:
                ours.answer(new)
                adapted.append(ours.answer(new))
    facts = {"swap_seconds": statistics.median(swaps), "swap_and_answer_seconds": statistics.median(answers)}
    _told(facts | {"longest_swap_seconds": max(swaps), "bare": _medians(bare), "adapted": _medians(adapted)})


def _adapter(model: Path, folder: Path) -> Path:
    """An adapter for the model with random factors."""
    from model import adapters, llava

    state = adapters.initial(model, 16, 32, "decoder", 0)
    draw = np.random.default_rng(0)
    for name in state:
        if adapters.factor(name) == "B":
            state[name] = (0.01 * draw.standard_normal(state[name].shape)).astype(np.float32)
    adapters.save(folder, state, adapters.spec_of(state, 32, llava.base_sha256(model)))
    return folder


class _Ours:
    """Our backend and one question of about 64 tokens; each time about another picture."""

    def __init__(self, folder: Path, bits: int, keep: int = 0) -> None:
        from model.backends import TorchBackend

        self.backend = TorchBackend(folder, bits, device="cuda", keep_bytes=keep)
        _endless(self.backend.loaded.core)
        self._pictures = np.random.default_rng(0)

    def question(self, picture: np.ndarray, new: int, number: int = 0) -> Any:
        from model.backends import Request

        return Request(picture, " ".join(f"w{(7 * n + number) % 2000}" for n in range(60)), max_new_tokens=new)

    def picture(self) -> np.ndarray:
        return self._pictures.integers(0, 256, (480, 400, 3), dtype=np.uint8)

    def answer(self, new: int) -> dict[str, float]:
        items = list(self.backend.generate([self.question(self.picture(), new)]))
        answer: Any = next(item[1] for item in items if isinstance(item, tuple))
        assert answer.tokens == new, answer.tokens
        speed = (new - 1) / (answer.seconds - answer.first_token_seconds)
        return {"first_token_seconds": answer.first_token_seconds, "tokens_per_second": speed}


class _Peer:
    """transformers' `generate` on weights that bitsandbytes quantized, every linear layer, float16 compute."""

    def __init__(self, folder: Path, bits: int) -> None:
        import torch
        from transformers import AutoProcessor, BitsAndBytesConfig, LlavaForConditionalGeneration

        kinds: dict[int, dict[str, Any]] = {16: {}, 8: {"load_in_8bit": True}}
        kinds[4] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kinds[4] |= {"bnb_4bit_compute_dtype": torch.float16}
        options = {"quantization_config": BitsAndBytesConfig(**kinds[bits])} if bits < 16 else {}
        self.network = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float16, device_map={"": "cuda"}, **options
        ).eval()
        self._processor = AutoProcessor.from_pretrained(folder)
        _endless(self.network)
        self._pictures = np.random.default_rng(0)

    def answer(self, new: int) -> dict[str, float]:
        import torch

        begin = time.perf_counter()
        config = self.network.config
        picture = self._pictures.integers(0, 256, (480, 400, 3), dtype=np.uint8)
        pixels = self._processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        ids = torch.tensor([[config.image_token_id] * config.image_seq_length + list(range(10, 74))], device="cuda")
        clock = _Clock()
        with torch.no_grad():
            self.network.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels.to("cuda", torch.float16),
                max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock,
            )  # fmt: skip
        torch.cuda.synchronize()
        first = clock.seen[1] - begin  # the first call of a streamer brings the prompt
        return {"first_token_seconds": first, "tokens_per_second": (new - 1) / (clock.seen[-1] - clock.seen[1])}


class _Clock:
    """A streamer that only looks at the clock."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _value: Any) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Crowd:
    """People who each look at a picture of their own and ask again as soon as they were answered."""

    def __init__(self, ours: _Ours, questions: int, new: int, seen: bool) -> None:
        self.ours, self.questions, self.new, self.seen = ours, questions, new, seen

    def run(self, people: int) -> dict[str, float]:
        """Tokens/s of all together, median and 95th percentile of the wait for a first token, seconds."""
        pictures = [self.ours.picture() for _ in range(people)]
        if self.seen:
            for picture in pictures:
                self.ours.backend.prepare(picture)
        left = dict.fromkeys(range(people), self.questions)
        asked: dict[int, float] = {}
        waits: list[float] = []
        waiting = deque(range(people))
        tokens, batch, began = 0, self.ours.backend.open_batch(), time.perf_counter()
        asked = dict.fromkeys(range(people), began)
        while waiting or batch.active:
            some = [
                waiting.popleft() for _ in range(min(len(waiting), batch.joins, batch.capacity - len(batch.active)))
            ]
            if some:
                batch.add([(n, self.ours.question(pictures[n], self.new, 31 * left[n] + n)) for n in some])
            for item in batch.step():
                now = time.perf_counter()
                number = item[0] if isinstance(item, tuple) else item.index
                if number in asked:
                    waits.append(now - asked.pop(number))
                if isinstance(item, tuple):
                    tokens += item[1].tokens
                    left[number] -= 1
                    if left[number]:
                        asked[number] = now
                        waiting.append(number)
        seconds = time.perf_counter() - began
        batch.close()
        late = float(np.quantile(waits, 0.95))
        return {"tokens_per_second": tokens / seconds, "first_token_median": statistics.median(waits), "p95": late}


def _endless(core: Any) -> None:
    """Random weights would end an answer anywhere."""
    core.generation_config.eos_token_id = [-1]


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _told(facts: dict[str, Any]) -> None:
    click.echo("RESULT " + json.dumps(facts))


if __name__ == "__main__":
    main()
