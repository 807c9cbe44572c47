"""Who may take part, as the running SuperLink knows it: keys are registered there, and revoked ones taken out.

Not here: the tables of both (`server.registry`, `server.guard`), and revoking (`server.members`).
"""

from pathlib import Path

from server import guard, registry
from server.link import Link, LinkError, flwr, parsed


def register(link: Link, name: str, public_key: Path) -> None:
    """Let the clinic with this public key take part. Raises LinkError."""
    key = public_key.read_text(encoding="utf-8").strip()
    try:
        answer = parsed(flwr(link, "supernode", "register", str(public_key), "--name", name, "--format", "json"))
        if answer.get("success") is False:
            raise LinkError(f"{name} was not registered: {answer.get('error-message', answer)}")
        node = str(answer.get("node-id", ""))
    except LinkError:  # after a power cut in between, the SuperLink knows a key that is not in our table
        node = registry.known_to_superlink(link.state, key)
        if not node:
            raise
    registry.remember(link.state, name, key, node)


def register_all(link: Link) -> list[str]:
    """Register every key under certs/clinics that is not registered yet; returns the names."""
    known = set(registry.registered(link.state).values())
    new = []
    for public_key in sorted((link.certs / "clinics").glob("*/node.pub")):
        if public_key.read_text(encoding="utf-8").strip() not in known:
            register(link, public_key.parent.name, public_key)
            new.append(public_key.parent.name)
    return new


def unregister_revoked(link: Link) -> None:
    """Tell the running SuperLink of keys that were revoked while it did not run: it would go on asking their nodes."""
    for row in guard.read_revoked(link.state).values():
        if node := registry.known_to_superlink(link.state, row.get("key", "")):
            flwr(link, "supernode", "unregister", node, "--format", "json")
