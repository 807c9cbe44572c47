"""afya.toml: written from one table, read back, and refused with every mistake named."""

from dataclasses import fields
from pathlib import Path

import pytest

from kiosk.settings import FILE, SETTINGS, Settings, SettingsError, default_text, load


def test_the_table_and_the_dataclass_agree() -> None:
    defaults = {field.name: field.default for field in fields(Settings) if field.name != "unknown"}
    assert defaults == {setting.name: setting.default for setting in SETTINGS}


def test_a_new_file_means_the_defaults_and_explains_each(afya_home: Path) -> None:
    assert load(afya_home) == Settings()
    (afya_home / FILE).write_text(default_text())
    assert load(afya_home) == Settings()
    assert all(f"# {setting.help}" in default_text() for setting in SETTINGS)


def test_other_programs_tables_are_left_alone_and_unknown_names_are_told(afya_home: Path) -> None:
    (afya_home / FILE).write_text('bits = 8\ncolour = "blue"\n[client]\nserver = "x"\n')
    assert load(afya_home) == Settings(bits=8, unknown=("colour",))


def test_every_mistake_is_named_at_once(afya_home: Path) -> None:
    (afya_home / FILE).write_text('bits = 5\nport = "8501"\nanswer_seconds = true\nmodel = 3\n')
    with pytest.raises(SettingsError) as refused:
        load(afya_home)
    for words in (
        "bits must be one of 4, 8, 16, 32",
        "port must be a number",
        "answer_seconds must be",
        "model must be text",
    ):
        assert words in str(refused.value)
    (afya_home / FILE).write_text("bits = ")
    with pytest.raises(SettingsError, match="afya-kiosk init"):
        load(afya_home)
