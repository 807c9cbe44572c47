"""An adapter as it arrives at a clinic: the same checks whether it is to be examined or to be installed.

Where the clinic knows the coordinator's key, only an adapter with a valid passport is installed, and none that is older
than the newest one seen. Not here: what a message looks like (`client.app`) and the examination (`client.sealed`).
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client import limits
from model import adapters, installed, passport, wire

MAX_EVIDENCE = 2 << 20  # characters; it names every clinic that contributed


def unpack(config: Mapping[str, Any], arrays: Mapping[str, Any], home: Path, folder: Path) -> str:
    """Write an adapter that arrived into `folder`, checked against this clinic's base and limits; returns its hash.

    Raises Refused, SettingsWrong, AdapterRejected, ModelError, PresetMissing, or KeyError, TypeError, ValueError for
    entries that are missing or of another kind.
    """
    from model.llava import base_sha256

    state = wire.unpack(arrays, wire.read_layout(str(config["layout"])))
    spec = adapters.spec_of(state, float(config["alpha"]), str(config["base-sha256"]))
    limits.check_adapter(spec, limits.read_limits(home))
    own = base_sha256(limits.base_model(home))
    if spec.base_sha256 != own:
        raise limits.Refused(f"the adapter is for the base {spec.base_sha256[:12]}, this clinic has {own[:12]}")
    adapters.save(folder, state, spec)
    digest = adapters.sha256(folder)
    if digest != config["sha256"]:
        raise limits.Refused("the adapter that arrived is not the one that was released (other hash)")
    return digest


def install(config: Mapping[str, Any], arrays: Mapping[str, Any], home: Path) -> tuple[str, str, str]:
    """Check and install a release; returns its name, its hash, and a notice, empty where its passport is valid.

    Raises as `unpack` does.
    """
    evidence = _record(str(config["evidence"]))
    with tempfile.TemporaryDirectory(prefix="afya-release-") as scratch:
        folder = Path(scratch) / "adapter"
        digest = unpack(config, arrays, home, folder)
        text = str(config["passport"]) if "passport" in config else None
        public = passport.trusted(home)
        if public is None:
            return installed.install(home, folder, evidence=evidence, passport=text), digest, passport.UNSIGNED
        if text is None:
            raise limits.Refused("the adapter has no passport, and this clinic takes only what its coordinator signed")
        record = passport.verify(text, public, digest, str(config["base-sha256"]))
        if evidence.get("round") != record.get("round"):
            raise limits.Refused("the evidence is of another round than the passport")
        _check_newer(record, passport.newest(home))
        name = installed.install(home, folder, evidence=evidence, passport=text)
    return name, digest, ""


def _record(text: str) -> dict[str, Any]:
    """The evidence of a release; nobody has signed it. Raises ValueError."""
    try:
        found = json.loads(text) if len(text) <= MAX_EVIDENCE else None
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the evidence is no record of at most {MAX_EVIDENCE} characters")
    return found


def _check_newer(record: Mapping[str, Any], newest: int) -> None:
    """Raise Refused for a signed release from before the newest that this clinic has installed, AdapterRejected for one
    without a number."""
    serial = passport.serial_of(record)
    if serial < newest:
        raise limits.Refused(f"the release has number {serial}, and this clinic has already seen {newest}")
