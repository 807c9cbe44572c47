"""One of our cases of the edge bench in a process of its own: prints a JSON line, writes logits where asked.

`decoder` times the quantized decoder alone on prompts of given ids, `reference` gives the float32 logits that both
engines are held against, `whole` goes from a picture to its first token.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

_PATH = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """Cases of the edge bench."""


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--prompts", type=_PATH, required=True)
@click.option("--new", default=64)
@click.option("--logits", type=_PATH)
def decoder(folder: Path, prompts: Path, new: int, logits: Path | None) -> None:
    """Time the decoder of a quantized FOLDER on the first prompt; last logits of every prompt into --logits."""
    from model import memory, onnx_session

    shape = json.loads((folder / "manifest.json").read_text())["decoder"]
    session = onnx_session.open_session(folder / "decoder.onnx", "cpu", onnx_session.threads())
    run, words = onnx_session.Decoder(session, shape, "cpu"), onnx_session.Embeddings(folder / "embeddings.safetensors")
    ids = np.load(prompts)
    warm = run.cache()
    warm.ensure(1, 8)
    run.run(words.rows(ids[0, :8])[None], warm, 0, [0])
    seen, facts = [], {}
    for number, prompt in enumerate(ids):
        cache = run.cache()
        cache.ensure(1, len(prompt) + new + 1)
        began = time.perf_counter()
        last = run.run(words.rows(prompt)[None], cache, 0, [0])[0, -1]
        first = time.perf_counter() - began
        seen.append(last)
        if number == 0:
            began = time.perf_counter()
            for count in range(new):
                last = run.run(words.rows([int(last.argmax())])[None], cache, 0, [len(prompt) + count])[0, -1]
            facts = {"first_token_seconds": first, "tokens_per_second": new / (time.perf_counter() - began)}
            facts["peak_rss_mb"] = memory.highest_resident_bytes() / 1e6
        if logits is None:
            break
    if logits is not None:
        np.save(logits, np.stack(seen))
    _told(facts)


@main.command()
@click.argument("model", type=_PATH)
@click.option("--prompts", type=_PATH, required=True)
@click.option("--logits", type=_PATH, required=True)
def reference(model: Path, prompts: Path, logits: Path) -> None:
    """Float32 logits after the last token of every prompt, by PyTorch."""
    import torch

    from model import llava

    core = llava.load(model, 32, device="cpu").core
    found = []
    with torch.no_grad():
        for prompt in np.load(prompts):
            embedded = core.get_input_embeddings()(torch.from_numpy(prompt)[None])
            hidden = core.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
            found.append(core.lm_head(hidden)[0].float().numpy())
    np.save(logits, np.stack(found))
    _told({})


@main.command()
@click.argument("folder", type=_PATH)
@click.option("--bits", default=0, help="Bits of the torch backend; 0: FOLDER is quantized for ONNX Runtime.")
@click.option("--times", default=5, help="Pictures asked about; the first is the cold one.")
@click.option("--new", default=8, help="Tokens of an answer.")
def whole(folder: Path, bits: int, times: int, new: int) -> None:
    """The whole model, from a picture to its answer; each time another picture."""
    from model import memory
    from model.backends import Backend, Request, TorchBackend
    from model.onnx_backend import OnnxBackend

    began = time.perf_counter()
    backend: Backend = TorchBackend(folder, bits, device="cpu") if bits else OnnxBackend(folder, device="cpu")
    opened, firsts, alls = time.perf_counter() - began, [], []
    pictures = np.random.default_rng(0)
    for _ in range(times):
        picture = pictures.integers(0, 256, (480, 400, 3), dtype=np.uint8)
        items = backend.generate([Request(picture, "Which organ is shown in this picture?", max_new_tokens=new)])
        answer: Any = next(item[1] for item in items if isinstance(item, tuple))
        firsts.append(answer.first_token_seconds)
        alls.append(answer.seconds)
    warm = slice(1, None) if times > 1 else slice(None)
    facts = {"open_seconds": opened, "cold_first_token_seconds": firsts[0], "cold_answer_seconds": alls[0]}
    facts |= {"first_token_seconds": float(np.median(firsts[warm])), "answer_seconds": float(np.median(alls[warm]))}
    _told(facts | {"peak_rss_mb": memory.highest_resident_bytes() / 1e6})


def _told(facts: dict[str, float]) -> None:
    click.echo("RESULT " + json.dumps(facts))


if __name__ == "__main__":
    main()
