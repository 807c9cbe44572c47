"""Pseudo-labels: whose questions are asked about which picture, and that the teachers' answers become training rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.data import DataError, Sample
from server import pseudo, recipe
from server.train import _model, _teacher
from server.train_data import build_bank
from tests.tiny import tiny_model


def row(number: int, picture: np.ndarray, question: str, place: str, source: str = "slake") -> Sample:
    return Sample(str(number), picture, question, "Yes", "closed", f"g{number}", source, meta={"location": place})


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    pictures = [np.full((32, 32, 3), 60 * n, dtype=np.uint8) for n in range(4)]
    rows = [
        row(0, pictures[0], "Is it a?", "Lung"),
        row(1, pictures[1], "Is it b?", "Lung"),
        row(2, pictures[1], "Is it a?", "Lung"),
        row(3, pictures[2], "Is it c?", "Head"),
        row(4, pictures[3], "Is it d?", "Lung", source="phantoms"),
    ]
    return tiny_model(tmp_path_factory.mktemp("teacher")), rows


def test_pictures_get_questions_of_their_kind_that_they_were_not_asked(taught: tuple[Path, list[Sample]]) -> None:
    model, rows = taught
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    bank = build_bank(rows, processor, 4, torch.device("cpu"))
    asked = pseudo.questions(bank, 5, np.random.default_rng(0))
    assert [(image, sample.question, sample.source) for image, sample in asked] == [(0, "Is it b?", "pseudo")]


def test_teachers_answers_become_rows_of_the_same_pictures(
    taught: tuple[Path, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = taught
    _, processor = _model(recipe.Recipe(), rows, folder, ())
    teacher = _teacher(folder, "cpu")
    bank = build_bank(rows, processor, teacher.config.image_seq_length, torch.device("cpu"))
    monkeypatch.setattr(pseudo, "_answers", lambda *given: [f"said about {len(given[2])}"])
    assert pseudo.add(bank, [teacher, teacher], processor, 5, seed=1) == 1
    assert bank.samples[-1].answer == "said about 1"
    assert bank.image_of[-1] == 0
    assert len(bank.samples) == len(bank.encoded) == len(bank.image_of) == len(rows) + 1
    assert any(label >= 0 for label in bank.encoded[-1].labels)


def test_a_padded_batch_answers_as_each_question_alone() -> None:
    from model import phantoms
    from model.presets import reference_path

    rows = phantoms.make(2, list(phantoms.SCANNERS)[:1], seed=3)
    folder = reference_path("reference-few")
    _, processor = _model(recipe.Recipe(), rows, folder, ())
    teacher = _teacher(folder, "cpu")
    bank = build_bank(rows, processor, teacher.config.image_seq_length, torch.device("cpu"))
    asked = list(zip(bank.image_of, rows, strict=True))[:4]
    assert len({len(encoded.ids) for encoded in bank.encoded[:4]}) > 1
    together = pseudo._answers(teacher, bank, asked, processor)
    assert all(together)
    assert together == [pseudo._answers(teacher, bank, [one], processor)[0] for one in asked]


def test_teachers_that_speak_other_tokens_are_refused(taught: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    folder, rows = taught
    from transformers import AutoProcessor

    other = tmp_path / "other"
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["unheard"])
    processor.save_pretrained(other)
    with pytest.raises(DataError, match="tokenizers differ"):
        _model(recipe.Recipe(), rows, None, (folder, other))
