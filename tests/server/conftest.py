"""What several tests of the server start from, built once for the whole run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one or two turns about 12 synthetic pictures, and one without a picture."""
    from PIL import Image

    from model import phantoms

    folder = tmp_path_factory.mktemp("rows")
    names = [name for name, scanner in phantoms.SCANNERS.items() if scanner.standard]
    samples = phantoms.make(12, names, seed=5)
    made: list[dict[str, Any]] = [{"id": "text", "conversations": turns("Say yes.", "yes")}]
    for number, sample in enumerate(samples[:24]):
        name = f"{sample.group.replace('/', '_')}.png"
        Image.fromarray(sample.image).save(folder / name)
        said = turns(f"<image>\n{sample.question}", sample.answer)
        said += turns("Sure?", "yes") if number % 3 == 0 else []
        made.append({"id": number, "image": name, "conversations": said})
    (folder / "rows.json").write_text(json.dumps(made), encoding="utf-8")
    return folder / "rows.json"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "model")
