"""An imported checkpoint against recorded outputs of the original code: logits, answers, pixels, training, tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint_keys as keys
from model import llava
from model.checkpoints import ImportReport, import_checkpoint
from tests.model import originals

LIMIT = 1e-4  # largest difference of a logit, float32 on a CPU


@pytest.fixture(scope="module")
def vectors(shared: Path) -> Path:
    folder = shared / "vectors" / "original_ckpt_tinyllava"
    if not folder.is_dir():
        pytest.skip("the vectors of the original code are not here: shared/vectors/original_ckpt_tinyllava")
    return folder


@pytest.fixture(scope="module")
def imported(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImportReport]:
    """The original's checkpoint imported with its own tower and with the tower's folder, by the suffix of the cases."""
    out = tmp_path_factory.mktemp("imported")
    modes = {"ckpt_tower": "auto", "seed_load_path": "tower"}
    return {n: import_checkpoint(vectors / "checkpoint", out / n, tower_weights=m) for n, m in modes.items()}


CASES = ("v1_rgb__ckpt_tower", "llava_v1_gray__ckpt_tower", "v1_text_only__ckpt_tower", "v1_rgb__seed_load_path")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_the_originals(vectors: Path, imported: Any, name: str) -> None:
    case = next(c for c in json.loads((vectors / "cases.json").read_text()) if c["name"] == name)
    want = np.load(vectors / f"{name}.npz")
    loaded = llava.load(imported[name.split("__")[1]].out, 32, device="cpu")
    ids = torch.tensor([originals.image_ids(case["input_ids"], loaded.core)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case["image"]:
        picture = Image.open(vectors / case["image"]).convert("RGB")
        inputs["pixel_values"] = loaded.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = loaded.core(**inputs).logits[0, :, :560]
        answer = loaded.core.generate(**inputs, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert (logits[want["positions"]] - torch.tensor(want["logits"])).abs().max() < LIMIT
    assert np.array_equal(logits.argmax(-1).numpy(), want["logits_argmax"])
    assert answer.tolist() == case["greedy_new_tokens"]


def test_pixels_are_the_originals_bit_by_bit(vectors: Path, imported: Any) -> None:
    from transformers import AutoProcessor

    pictures = AutoProcessor.from_pretrained(imported["ckpt_tower"].out, backend="pil").image_processor
    for name, want in np.load(vectors / "pixel_values.npz").items():
        picture = Image.open(vectors / f"{name}.png").convert("RGB")
        assert np.array_equal(pictures(picture, return_tensors="np")["pixel_values"][0], want), name


def test_five_training_steps_are_the_originals(vectors: Path, imported: Any) -> None:
    """Run in float64, which does not depend on threads or kernels: the recorded float32 losses are 1e-6 from it."""
    batch = json.loads((vectors / "train_vectors.json").read_text())["v1_full"]
    want = json.loads((vectors / "train_steps_expected.json").read_text())
    core = originals.network(imported["ckpt_tower"].out).train()
    with torch.no_grad():
        first = loss_of(core, batch, vectors).item()
    assert abs(first - want["losses"][0]) <= 1e-6, "two steps of float32"
    core = core.double()
    core.model.vision_tower.requires_grad_(False)
    named = {keys.canonical(name): name for name in want["grad_norms"][0]}
    weights = {name: value for name, value in core.named_parameters() if name in named}
    optimizer = torch.optim.AdamW([p for p in core.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    losses = []
    for norms in [*want["grad_norms"], None]:
        loss = loss_of(core, batch, vectors)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in weights.items():
            assert norms is None or value.grad.norm().item() == pytest.approx(norms[named[name]], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(losses, want["losses"], strict=True)) <= 1e-6


def loss_of(core: Any, batch: dict[str, Any], vectors: Path) -> torch.Tensor:
    """Loss of a recorded batch over the original's classes: without the row of `<image>`."""
    inputs, labels = rows(batch, core)
    images = torch.tensor(np.load(vectors / "train_images_v1_full.npz")["images"])
    inputs["pixel_values"] = images[[-200 in ids for ids in batch["input_ids"]]].to(core.dtype)
    logits = core(**inputs).logits[:, :-1, :560]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def rows(batch: dict[str, Any], core: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and labels of a recorded batch: picture places expanded, padded on the right."""
    ids, labels = [], []
    for given, wanted, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        kept = [(i, w) for i, w, m in zip(given, wanted, mask, strict=True) if m]
        size = core.config.image_seq_length
        ids.append(originals.image_ids([i for i, _ in kept], core))
        labels.append([t for i, w in kept for t in ([-100] * size if i == -200 else [w])])
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return (
        {"input_ids": padded, "attention_mask": mask},
        torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
    )


def test_a_tower_that_differs_is_reported(imported: Any) -> None:
    own, other = imported["ckpt_tower"], imported["seed_load_path"]
    assert (own.tower_weights, other.tower_weights) == ("checkpoint", "tower")
    assert own.tower_different == own.tower_compared == 53
    assert own.tower_largest_difference == pytest.approx(0.2219, abs=1e-3)
    assert "53 of 53" in own.notes[0] and "checkpoint are used" in own.notes[0]
    assert not own.dropped and any("head" in key for key in other.dropped)


def test_the_folder_says_what_it_is(imported: Any) -> None:
    report = imported["ckpt_tower"]
    facts = json.loads((report.out / "import.json").read_text())
    config = json.loads((report.out / "config.json").read_text())
    ids = json.loads((report.out / "generation_config.json").read_text())
    assert (report.template, facts["template"], report.image_tokens, report.image_token_id) == ("v1", "v1", 729, 560)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
    assert config["text_config"]["vocab_size"] == 561 and not config["tie_word_embeddings"]
    assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"], ids["suppress_tokens"]) == (1, 2, 0, [560])


def test_the_slow_tokenizer_becomes_a_fast_one(vectors: Path, imported: Any) -> None:
    tokenizer = llava.load(imported["ckpt_tower"].out, 32, device="cpu").processor.tokenizer
    assert tokenizer.init_kwargs["legacy"] is False
    assert tokenizer.convert_tokens_to_ids("<image>") == 560
    for case in json.loads((vectors / "cases.json").read_text()):
        first, *rest = [tokenizer(part)["input_ids"] for part in case["prompt"].split("<image>")]
        assert first + [t for part in rest for t in (-200, *part[1:])] == case["input_ids"]
