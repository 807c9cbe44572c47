"""Which vision tower an imported model gets: where its configuration is, and whose weights are used.

A checkpoint names its tower by a hub name or a folder, and often holds the tower's weights as well. Where both are
here they are compared: the original code always ran those of the tower's folder, also when the checkpoint's had been
tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import checkpoint_keys as keys
from model import presets
from model.checkpoint_config import Tower, tower_of
from model.checkpoint_plan import Weights, tower_weights
from model.checkpoint_source import CheckpointError, Entry, Reader, read_json, weight_files

TOWER_WEIGHTS = ("auto", "checkpoint", "tower")


def find(
    src: Path, config: dict[str, Any], given: Path | None, preset: presets.Preset | None, *, needed: bool
) -> Tower | None:
    """The tower of a checkpoint: the folder given, else the preset's, else what `mm_vision_tower` names.

    None where nothing is `needed` and nothing was given. Raises CheckpointError with what to fetch.
    """
    if given is not None:
        if not (found := read_json(Path(given) / "config.json")):
            raise CheckpointError(f"{given} holds no config.json, so it is no tower; give its folder with --tower.")
        return tower_of(found, Path(given), Path(given).name)
    if not needed:
        return None
    name = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    folder = _local(src, name)
    if preset is not None and preset.tower is not None:
        return tower_of(presets.TOWERS[preset.tower], folder, preset.tower)
    if folder is not None:
        return tower_of(read_json(folder / "config.json"), folder, Path(name).name if name else folder.name)
    if name in presets.TOWERS:
        return tower_of(presets.TOWERS[name], None, name)
    raise CheckpointError(
        f"The vision tower {name or '(not named)'} is not here: fetch it and pass its folder as --tower."
    )


def _local(src: Path, name: str) -> Path | None:
    """The folder of a tower named by a path (from the checkpoint's folder or here), else the checkpoint's own."""
    places = [src / name, Path(name)] if name else []
    places.append(src / "vision_tower")
    return next((place.resolve() for place in places if place.resolve() != src and _is_tower(place)), None)


def _is_tower(place: Path) -> bool:
    kind = str(read_json(place / "config.json").get("model_type", ""))
    return "siglip" in kind or "clip" in kind


@dataclass
class Comparison:
    """Whose weights are used, the other ones, and how far apart they were found to be while the import ran."""

    used: str
    others: dict[str, Entry] = field(default_factory=dict)
    compared: int = 0
    different: int = 0
    largest: float = 0.0

    def look(self, name: str, tensor: Any, reader: Reader) -> None:
        """Compare one tensor with its counterpart, if there is one; the counterpart's file is let go at once."""
        if (entry := self.others.get(name)) is None:
            return
        other = reader.get(entry)
        gap = float("inf")
        if other.shape == tensor.shape:
            gap = float((tensor.float() - other.to(tensor.dtype).float()).abs().max())
        reader.close()
        self.compared += 1
        self.different += gap != 0
        self.largest = max(self.largest, gap)

    def notes(self) -> list[str]:
        """The sentence about a difference, if there is one."""
        if not self.different:
            return []
        far = f"{self.different} of {self.compared} weights of the vision tower differ between checkpoint and tower"
        return [f"{far} folder, by up to {self.largest:.3g}; those of the {self.used} are used"]


def choose(weights: Weights, tower: Tower | None, choice: str, reader: Reader) -> Comparison:
    """Put the chosen tower's weights into `weights`. Raises CheckpointError where the chosen ones are not here."""
    inside = {name: entry for name, entry in weights.named.items() if name.startswith(keys.TOWER)}
    paths = weight_files(tower.folder) if tower is not None and tower.folder is not None else []
    outside: dict[str, Entry] = {}
    if paths and paths[0].parent.resolve() not in {entry.path.parent.resolve() for entry in inside.values()}:
        outside, _ = tower_weights(paths, reader)
    if choice == "checkpoint" and not inside:
        raise CheckpointError("The checkpoint holds no weights of a vision tower; leave out --tower-weights.")
    if not outside and (choice == "tower" or not inside):
        name = tower.name if tower is not None else "its folder"
        raise CheckpointError(
            f"The weights of the vision tower ({name}) are not here: fetch them and pass --tower DIR."
        )
    used, others = ("checkpoint", outside) if inside and choice != "tower" else ("tower", inside)
    if used == "tower":
        weights.named = {name: entry for name, entry in weights.named.items() if name not in inside} | outside
    return Comparison(used, {name: entry for name, entry in others.items() if name in weights.named})
