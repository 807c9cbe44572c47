"""Is the model that was loaded the one in the folder, does it run as asked, and does it look at the picture?

Run before the first answer. Each check catches failures that otherwise only show as worse answers: a projector or tower
that is missing, zeroed or another's, a wrong number of image tokens, a device or precision that was replaced silently,
files that changed, another adapter or template, and pictures that all look alike to the model. What loading itself
refuses (missing weights, cut files, an adapter of another base) is not repeated. Not covered: weights that were wrong
already when the folder was written without hashes, and whether answers are right (`model.evaluate`).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import adapters, canary_weights, files, llava, manifest
from model.checkpoint_facts import FETCHED

_REHASHED = 2**29  # bytes of a folder up to which all files are read again
_PROBE_TOKENS = 16  # image tokens shown to the decoder: enough to see whether it looks, in a moment on any machine
_ALIKE = 1e-3  # relative distance of features or scores below which two pictures are the same to the model


class CanaryFailed(RuntimeError):
    """The loaded model must not answer; the message says in one sentence why and what to do."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `problem` is None where it is as it should be, else one sentence."""

    name: str
    problem: str | None


@dataclass(frozen=True)
class CanaryReport:
    """All checks that were made, in order; nothing is made after the first problem."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def problem(self) -> str | None:
        """The sentence of the check that failed, None where all is well."""
        return next((check.problem for check in self.checks if check.problem), None)


def check(backend: Any, folder: Path, *, device: str | None = None, adapter: Path | None = None) -> CanaryReport:
    """Look at a backend that was loaded from `folder`; `device` and `adapter` are what was asked for, if anything.

    Takes under a second for the reference model. Never raises for a fault of the model.
    """
    began, done = time.perf_counter(), []
    todo: list[tuple[str, Callable[[], str | None]]] = [
        ("device", lambda: _device(backend, device)),
        ("files", lambda: _files(backend.loaded, Path(folder))),
        ("adapter", lambda: _adapter(backend, adapter)),
        ("template", lambda: _template(backend.loaded, Path(folder))),
    ]
    if hasattr(backend.loaded, "core"):
        seen = functools.cache(lambda: _features(backend))
        todo += [
            ("image tokens", lambda: _image_tokens(backend.loaded, seen())),
            ("kernels", lambda: canary_weights.kernels(backend.loaded)),
        ]
        if not manifest.is_quantized(folder):  # those were held against their hashes when they were loaded
            todo.append(("weights", lambda: canary_weights.tower(backend.loaded, Path(folder))))
        todo.append(("pictures", lambda: _pictures(backend, seen())))
    else:
        todo.append(("pictures", lambda: _answers(backend)))
    for name, look in todo:
        try:
            problem = look()
        except Exception as error:  # whatever breaks here would break under a question
            text = str(error).strip().splitlines() or [type(error).__name__]
            problem = f"The check of {name} broke down: {text[0].rstrip('.')}; copy the model folder again."
        done.append(Check(name, problem))
        if problem:
            break
    return CanaryReport(tuple(done), time.perf_counter() - began)


def require(report: CanaryReport) -> None:
    """Raise CanaryFailed where a check failed."""
    if report.problem:
        raise CanaryFailed(report.problem)


def _device(backend: Any, asked: str | None) -> str | None:
    loaded = backend.loaded
    if asked and asked.split(":")[0] != loaded.device.split(":")[0]:
        return (
            f"{asked} was asked for, but the model runs on {loaded.device}; look at the GPU's driver, or ask for cpu."
        )
    strays = {p.device.type for p in loaded.core.parameters()} if hasattr(loaded, "core") else set()
    if strays - {loaded.device.split(":")[0]}:
        return f"Parts of the model lie on {', '.join(sorted(strays))} instead of {loaded.device}; free memory there."
    return None


def _files(loaded: Any, folder: Path) -> str | None:
    """Files against the hash taken when they were loaded, and against those written when they were fetched."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rehashed = hasattr(loaded, "core") and size <= _REHASHED and not manifest.is_quantized(folder)
    if rehashed and llava.base_sha256(folder) != loaded.base_sha256:
        return f"The files in {folder} are not those that were loaded; start again, or copy the model folder again."
    listing = folder / FETCHED
    for part in json.loads(listing.read_bytes())["files"] if listing.is_file() else []:
        path = folder / part["name"]
        wrong = not path.is_file() or path.stat().st_size != part["size"]
        if not wrong and part["sha256"] and part["size"] <= _REHASHED:
            wrong = files.sha256_file(path) != part["sha256"]
        if wrong:
            return f"{path} is not the file that was fetched; fetch the model again."
    return None


def _adapter(backend: Any, wanted: Path | None) -> str | None:
    if wanted is None:
        return None
    if backend.adapter_sha256 != adapters.sha256(wanted):
        return f"Another adapter than {wanted.name} answers; install it again."
    return None


def _template(loaded: Any, folder: Path) -> str | None:
    """The folder's template is the one in use, the tokenizer knows its marks, and the folder's chat template agrees."""
    from model.prompts import MarkTemplate, encode, template_of

    processor: Any = getattr(loaded, "processor", None)  # an ONNX folder has a tokenizer alone
    tokenizer, used = (processor or loaded).tokenizer, loaded.template
    now = template_of(folder)
    if now != used:
        return f"The folder's conversation template is {now.name}, but {used.name} is in use; start again."
    marks = ["<image>"]
    if isinstance(used, MarkTemplate):
        marks = [used.bos, used.image, used.user, used.assistant, used.end]
    lost = [mark for mark in marks if tokenizer.convert_tokens_to_ids(mark) in (None, tokenizer.unk_token_id)]
    if lost:
        return f"The tokenizer in {folder} does not know {lost[0]}, so its template is older; import the model again."
    if isinstance(used, MarkTemplate) and getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": "Is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != encode(tokenizer, used, [("Is it?", "")], 1)[0]:
            return f"The chat template in {folder} is not the one in use ({used.name}); import the model again."
    return None


def _features(backend: Any) -> Any:
    """Projected features of the three pictures, (3, tokens, hidden)."""
    from model import decode

    with backend.computing():
        return decode.encode_pictures(backend.loaded.core, backend.loaded.processor, pictures())[0]


def _image_tokens(loaded: Any, features: Any) -> str | None:
    """The tower gives as many tokens as the configuration and the processor promise, under the tokenizer's id."""
    config, processor = loaded.core.config, loaded.processor
    made, promised = int(features.shape[1]), config.image_seq_length
    if made != promised:
        return f"The tower makes {made} tokens of a picture, the configuration says {promised}; import the model again."
    written = processor(text="<image>", images=pictures()[0], add_special_tokens=False, return_tensors="pt")
    count = int((written["input_ids"] == config.image_token_id).sum())
    if count != made:
        return f"The processor writes {count} image tokens, the tower makes {made}; import the model again."
    return None


def pictures() -> list[np.ndarray]:
    """A synthetic chest and a synthetic brain (the same on every machine), and a grey picture with nothing in it."""
    from model import data, phantoms, reliance

    look = next(name for name, scanner in phantoms.SCANNERS.items() if scanner.standard)
    kinds = ("chest", "brain")
    rows = [phantoms.make(1, [look], seed=11, organs={kind: 1.0})[0] for kind in kinds]
    real = [data.load_rgb(row) for row in rows]
    return [*real, reliance.blank(real[0])]


def _pairs() -> Iterator[tuple[int, int, str]]:
    yield 0, 1, "Two different pictures look alike to the model"
    yield 0, 2, "A picture looks like an empty one to the model"


def _pictures(backend: Any, features: Any) -> str | None:
    """Features and the scores after a few of them must differ between the pictures, and be numbers."""
    import torch

    from model import decode

    loaded = backend.loaded
    core = loaded.core
    with torch.no_grad(), backend.computing():
        places = torch.linspace(0, features.shape[1] - 1, min(_PROBE_TOKENS, features.shape[1])).long()
        head = [core.config.image_token_id] * len(places)
        layers = decode.heads(core, features[:, places.to(features.device)], head)
        ids = loaded.processor.tokenizer("Is it?", add_special_tokens=False)["input_ids"]
        rows = [decode.after(core, decode.cut(layers, 0, len(head), row), ids)[-1] for row in range(3)]
        scores = core.lm_head(torch.stack(rows)).float()
    for name, values in (("features", features.float()), ("scores", scores)):
        if not bool(torch.isfinite(values).all()):
            return f"The model's {name} are not numbers, so its weights are damaged; copy the model folder again."
        for first, second, words in _pairs():
            apart = float((values[first] - values[second]).norm() / values[first].norm().clamp(min=1e-12))
            if apart < _ALIKE:
                return f"{words} ({name} differ by {apart:.1e}); it must not answer: copy the model folder again."
    return None


def _answers(backend: Any) -> str | None:
    """The same through answers, for a backend whose parts cannot be looked at."""
    from model.backends import Request

    found = []
    for picture in pictures():
        request = Request(picture, "What is shown?", max_new_tokens=2)
        answer = next(item[1] for item in backend.generate([request]) if isinstance(item, tuple))
        found.append((answer.text, round(answer.confidence, 6)))
    for first, second, words in _pairs():
        if found[first] == found[second]:
            return f"{words} (the answers are the same); it must not answer: copy the model folder again."
    return None
