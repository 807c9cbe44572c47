"""`import`, `fetch` and `list` as a person meets them."""

import json
from pathlib import Path

import click
from click.testing import CliRunner

from model import import_cli
from tests.model import originals
from tests.model.lora import random_adapter


def call(command: click.Command, *arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_fetch_then_import_keeps_where_it_came_from(tmp_path: Path) -> None:
    made = originals.original()
    source = originals.write_original(made, tmp_path / "source")
    tower = originals.write_tower(made, tmp_path / "tower")
    code, out, error = call(import_cli.fetch, source, "--out", tmp_path / "raw")
    assert code == 0 and "4 files" not in error and "revision" in out and "model.safetensors" in error
    code, out, error = call(import_cli.import_, tmp_path / "raw", "--out", tmp_path / "model", "--tower", tower)
    assert code == 0 and "template v1" in out and "a picture is 4 tokens" in out and "100%" in error
    assert "equal to the tower's folder" in out
    facts = json.loads((tmp_path / "model" / "import.json").read_text())
    assert facts["source"] == "source" and len(facts["revision"]) == 64
    code, out, error = call(
        import_cli.import_, source, "--out", tmp_path / "second", "--tower", tower, "--template", "llava_v1", "--json"
    )
    assert code == 0 and not error and json.loads(out)["template"] == "llava_v1"


def test_mistakes_are_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    for command, arguments in (
        (import_cli.import_, (tmp_path / "absent", "--out", tmp_path / "out")),
        (import_cli.import_, (tmp_path, "--out", tmp_path / "out", "--preset", "nothing")),
        (import_cli.fetch, ("llava-med-v1.5-7b", "--out", tmp_path / "out")),
    ):
        code, out, error = call(command, *arguments)
        assert code == 1 and not out and error.startswith("Error: ") and len(error.strip().splitlines()) == 1


def test_list_shows_presets_models_and_adapters(tiny: Path, tmp_path: Path, afya_home: Path) -> None:
    from model import adapters

    out = call(import_cli.list_)[1]
    assert "No adapter is installed" in out and "not pinned yet" in out and "15.13" in out and "729" not in out
    name = adapters.install(afya_home, random_adapter(tiny, tmp_path / "adapter"), evidence={"round": 3})
    (afya_home / "models" / "mine").mkdir(parents=True)
    (afya_home / "models" / "mine" / "import.json").write_text('{"template": "v1", "source": "somewhere"}')
    out = call(import_cli.list_)[1]
    assert f"* {name}" in out and "imported from somewhere, template v1" in out
    facts = json.loads(call(import_cli.list_, "--json")[1])
    assert facts["adapters"] == [{"name": name, "current": True}] and facts["imported"][0]["name"] == "mine"
    known = {row["name"]: row for row in facts["models"]}
    assert known["reference"]["here"] and known["tinyllava-1.5b"]["parameters"] == 1_504_353_824
    assert known["llava-med-v1.5-7b"]["template"] == "mistral_instruct"
