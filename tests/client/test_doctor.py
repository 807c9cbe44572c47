"""The doctor against real servers on loopback: each fault alone gives its own sentence, and nothing is started."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from client import contact, doctor, node
from client.cli import main
from model import adapters
from model.llava import base_sha256
from scripts.federation import free_ports
from server import certs
from tests.client import servers
from tests.client.clinic import fill


@pytest.fixture
def made(tmp_path: Path) -> Path:
    certs.make(tmp_path / "c", ["north"])
    return tmp_path / "c"


def look(home: Path, server: str, made: Path) -> dict[str, doctor.Check]:
    link = node.connection(home, server, made / "clinics/north")
    return {check.name: check for check in doctor.examine(home, link)}


def test_five_of_five_wrong_servers_are_refused_each_in_its_own_sentence(
    afya_home: Path, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(certs, "CLOCK_SKEW", timedelta(days=10))
        patch.setattr(certs, "SERVER_DAYS", -1)
        (tmp_path / "expired").mkdir()
        for name in ("ca.crt", "ca.key"):
            (tmp_path / "expired" / name).write_bytes((made / name).read_bytes())
        certs.make(tmp_path / "expired", [])
    certs.make(tmp_path / "other", [])
    own = servers.self_signed(tmp_path / "own", made / "ca.crt")
    running = {
        "does not speak TLS": servers.plain(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        "nobody but itself vouches for": servers.proxied(own),
        "has expired": servers.proxied(tmp_path / "expired"),
        "of another name": servers.proxied(made, host="127.0.0.2"),
        "not this federation's": servers.proxied(tmp_path / "other"),
    }
    for words, server in running.items():
        with server as address:
            found = look(afya_home, address, made)
            assert not found["server"].ok and words in found["server"].detail, found["server"]
            assert found["server"].detail.count(". ") == 0 and "registration" not in found
            if words == "has expired":
                assert found["clock"].ok  # the server's clock agrees: it is the certificate that is old
            with pytest.raises(contact.NoContact):
                contact.key_status(address, made / "clinics/north/ca.crt", made / "clinics/north/node.key", None)


def test_an_address_that_leads_nowhere_is_told_apart(
    afya_home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "refuses connections" in look(afya_home, f"127.0.0.1:{free_ports(1)[0]}", made)["server"].detail
    assert "name in no-such-host.invalid" in look(afya_home, "no-such-host.invalid:1", made)["server"].detail
    for wrong in ("hub", ":1", "hub:x", "hub:99999", "server..example.org:8443", f"{'a' * 64}.example.org:8443"):
        assert "is not HOST:PORT" in look(afya_home, wrong, made)["server"].detail
    monkeypatch.setattr(contact, "SECONDS", 0.2)
    with servers.socket.create_server(("127.0.0.1", 0)) as silent:  # listens, and never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer within" in look(afya_home, address, made)["server"].detail
    with servers.plain(b"") as hangs_up:
        assert not look(afya_home, hangs_up, made)["server"].ok


@pytest.mark.parametrize(
    ("text", "words"),
    [("client = 5\n", "client is no table"), ("[client]\nserver = 'hub:1'\nport = 'abc'\n", "port is 'abc'")],
)
def test_odd_settings_are_said_in_a_sentence(afya_home: Path, text: str, words: str) -> None:
    (afya_home / "afya.toml").write_text(text)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1 and words in done.output and "Traceback" not in done.output
    assert not isinstance(done.exception, (AttributeError, ValueError))


@pytest.mark.parametrize(
    ("ahead", "words"), [(timedelta(minutes=-20), "20 minutes ahead of"), (timedelta(days=9), "9 days behind")]
)
def test_a_wrong_clock_is_said_with_how_much(afya_home: Path, made: Path, ahead: timedelta, words: str) -> None:
    with servers.dated(made, ahead) as address:
        found = look(afya_home, address, made)
    assert found["server"].ok and not found["clock"].ok and words in found["clock"].detail


def test_a_clock_before_the_certificate_is_a_fault_of_the_clock_too(
    afya_home: Path, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later").mkdir()
    for name in ("ca.crt", "ca.key"):
        (tmp_path / "later" / name).write_bytes((made / name).read_bytes())
    monkeypatch.setattr(certs, "CLOCK_SKEW", timedelta(days=-300))
    certs.make(tmp_path / "later", [])
    with servers.dated(tmp_path / "later", timedelta(days=400)) as address:
        found = look(afya_home, address, made)
    assert not found["server"].ok and "is not valid yet" in found["server"].detail
    assert not found["clock"].ok and "400 days behind" in found["clock"].detail


def test_a_superlink_that_is_away_is_not_the_clinics_fault(afya_home: Path, made: Path) -> None:
    with servers.proxied(made) as address:
        found = look(afya_home, address, made)
    assert found["server"].ok and "TLSv1.3" in found["server"].detail and found["clock"].ok
    assert not found["registration"].ok and "tell the coordinator" in found["registration"].detail


def test_what_is_missing_here_is_said_all_at_once(
    afya_home: Path, tiny: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    fill(afya_home, [], tiny)
    whole = look(afya_home, "127.0.0.1:1", made)
    assert [name for name, check in whole.items() if not check.ok] == ["server"]
    state = adapters.initial(tiny, 2, 8.0, "decoder", 0)
    adapters.save(afya_home.parent / "a", state, adapters.spec_of(state, 8.0, base_sha256(tiny)))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100 << 20}))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 700 << 20}))
    monkeypatch.setattr(doctor, "version", lambda _: "1.28.0")
    (afya_home / "afya.toml").write_text('model = "nowhere"\n[client]\nmax_rank = "many"\n')
    os.chmod(made / "clinics/north/node.key", 0o644)
    os.chmod(afya_home, 0o750)
    found = look(afya_home, "127.0.0.1:1", made)
    words = {
        "home": "chmod 700",
        "disk": "100 MiB free",
        "memory": "700 MiB of memory are free",
        "limits": "max_rank",
        "flower": "this version of Afya needs 1.41.0",
        "base model": "nowhere",
        "keys": "chmod 600",
        "server": "refuses connections",
    }
    for name, part in words.items():
        assert not found[name].ok and part in found[name].detail, found[name]
    assert len({check.detail for check in found.values()}) >= len(words)


def test_the_hand_made_request_is_flowers_own() -> None:
    from flwr.common import constant
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore import constant as names

    for size in (1, 127, 128, 215, 20_000):
        body = contact.activation(b"k" * size)
        assert body == ActivateNodeRequest(public_key=b"k" * size, heartbeat_interval=0).SerializeToString()
    sent = {names.FLEET_HTTP_PUBLIC_KEY_HEADER, constant.TIMESTAMP_HEADER, names.FLEET_HTTP_SIGNATURE_HEADER}
    assert sent == {"flwr-public-key", "flwr-timestamp", "flwr-signature"}
    assert doctor.CLOCK_SECONDS == constant.TIMESTAMP_TOLERANCE
