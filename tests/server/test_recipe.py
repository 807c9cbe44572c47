"""Recipes: overrides, and every fault named at once."""

from pathlib import Path

import pytest

from server import recipe
from server.recipe import RecipeError

REFERENCE = Path(__file__).parents[2] / "server" / "recipes" / "reference.toml"


def test_the_reference_recipe_is_whole_and_never_trains_on_its_validation_images() -> None:
    loaded = recipe.load(REFERENCE)
    assert loaded.data.validate in loaded.data.exclude_images_of
    assert loaded.engine.save_dtype == "float16"


def test_overrides_take_toml_values_and_plain_words() -> None:
    loaded = recipe.load(REFERENCE, ["optim.epochs=3", "engine.precision=fp32", "data.validate=''"])
    assert (loaded.optim.epochs, loaded.engine.precision, loaded.data.validate) == (3, "fp32", "")


def test_all_faults_come_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[optim]\nepocs = 3\nlr = 0\n[engine]\nprecision = 'fp8'\n[colour]\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    for part in ("epocs", "colour", "precision", "must be positive", "nothing to train on"):
        assert part in str(caught.value)


@pytest.mark.parametrize("item", ["optim.epochs", "epochs=3", "=3"])
def test_a_malformed_override_says_the_form(item: str) -> None:
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        recipe.load(REFERENCE, [item])


def test_a_missing_recipe_points_to_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="server/recipes"):
        recipe.load(tmp_path / "none.toml")
