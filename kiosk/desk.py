"""What every screen of the kiosk needs, made once for the process: the store, the model's queue, home and settings.

Opening brings the training folder in line with the database and starts loading the model in the background. Knows
nothing of Streamlit, so tests and scripts open a kiosk the same way.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from kiosk import export, inference, memlog
from kiosk.settings import Settings, load
from kiosk.store import CaseStore


@dataclass(frozen=True)
class Desk:
    """An open kiosk, shared by all browsers of this computer."""

    store: CaseStore
    engine: inference.Engine
    home: Path
    settings: Settings


def open_desk(home: Path, model: str = "", bits: str = "") -> Desk:
    """Open the kiosk of `home`; `model` and `bits` go before afya.toml. Raises StoreError, SettingsError, OSError."""
    settings = load(home)
    settings = replace(settings, model=model or settings.model, bits=int(bits or settings.bits))
    store = CaseStore(home / "kiosk.db")
    export.reconcile(store, home)
    memlog.note(store, "start")
    engine = inference.Engine(store, home, settings, lambda: inference.make_backend(settings))
    return Desk(store, engine, home, settings)
