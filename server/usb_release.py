"""A release by stick: the newest release as a signed file, for a clinic that is never on the link.

Where the last round was not released yet, it is examined first, on the server's own data alone (`gate-data`), and
released or refused as ever (`server.publish`). Not here: counts of clinics without a network, which would need a file
of their own.
"""

from dataclasses import fields, replace
from pathlib import Path

from model import bundle
from model.bundle import BundleRejected
from server import checkpoint as store
from server import publish, release, signing
from server.events import Events
from server.link import Link
from server.office import Office, current, history
from server.settings import Settings


def send(link: Link, root: Path, path: Path) -> Path:
    """Write the newest release of the rounds' folder `root` to `path`; returns the release's folder.

    Raises BundleRejected when there is none, SettingsRejected, CertsError.
    """
    bundle.check_replaceable(path, "release")
    now, _ = store.latest(root)
    if now is None:
        raise BundleRejected(f"{root} holds no rounds, so there is nothing to release.")
    file = signing.signing_key(link.certs)
    known = {entry.name for entry in fields(Settings)}
    settings = Settings(**{name: value for name, value in now.config.items() if name in known})
    settings = replace(settings, checkpoint_dir=str(root), signing_key=str(file))
    office = Office(root, settings, Events(root), lambda: {}, lambda *_: iter(()))
    if not any(row["round"] == now.round for row in history(office)):
        publish.release_now(office, now)
    folder = current(office)
    if folder is None:
        raise BundleRejected("Nothing was released yet; `afya-server status` says why.")
    content = release.content(folder)
    arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    record = {"config": dict(content.config_records["config"])}
    bundle.write(path, "release", record, arrays, signing.load(file).sign)
    return folder
