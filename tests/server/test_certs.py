"""Keys and certificates: made once, private, accepted by real TLS; anything else is refused."""

import os
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from server import certs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("federation") / "certs"
    certs.make(out, ["north", "south"])
    return out


def test_private_files_are_private_and_the_rest_readable(made: Path) -> None:
    for name in ("ca.key", "server.key", "clinics/north/node.key"):
        assert (made / name).stat().st_mode & 0o777 == 0o600
    for name in ("ca.crt", "server.pem", "clinics/north/node.pub", "clinics/north/ca.crt"):
        assert (made / name).stat().st_mode & 0o777 == 0o644
    assert not (made / "clinics/north/ca.key").exists()
    assert certs.check(made) == []


def test_a_later_clinic_changes_nothing_that_exists(tmp_path: Path) -> None:
    certs.make(tmp_path / "c", ["north"])
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    written = certs.make(tmp_path / "c", ["north", "south"])
    assert {p.parent.name for p in written} == {"south"}
    assert all(path.read_bytes() == data for path, data in before.items())


def test_the_node_key_is_the_kind_that_flower_takes(made: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

    private = serialization.load_ssh_private_key((made / "clinics/north/node.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((made / "clinics/north/node.pub").read_bytes())
    assert private.public_key() == public
    assert public.curve.name == "secp384r1"
    assert bytes_to_public_key(public_key_to_bytes(public)) == public


def _handshake(server: Path, authority: Path, name: str) -> str:
    """TLS version of a connection to a server with `server`'s certificate, for a client that trusts `authority`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with raw:
                try:
                    context.wrap_socket(raw, server_side=True).close()
                except OSError:
                    return  # the client did not like the certificate: that is what the test looks at

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            client = ssl.create_default_context(cafile=str(authority / "ca.crt"))
            address = listener.getsockname()
            with socket.create_connection(address) as raw, client.wrap_socket(raw, server_hostname=name) as secure:
                return str(secure.version())
        finally:
            thread.join()


def test_a_client_with_the_authority_connects(made: Path) -> None:
    assert _handshake(made, made, "localhost") == "TLSv1.3"
    assert _handshake(made, made, "127.0.0.1") == "TLSv1.3"


def test_a_wrong_name_and_a_wrong_authority_are_refused(made: Path, tmp_path: Path) -> None:
    certs.make(tmp_path / "other", [])
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(made, made, "evil.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(tmp_path / "other", made, "localhost")


def test_openssl_agrees(made: Path) -> None:
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(made / "ca.crt"), str(made / "server.pem")]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_is_said(made: Path, tmp_path: Path) -> None:
    assert "afya-server certs" in certs.check(tmp_path / "nothing")[-1]
    certs.make(tmp_path / "c", [])
    os.chmod(tmp_path / "c/server.key", 0o644)
    assert "chmod 600" in certs.check(tmp_path / "c")[0]
    (tmp_path / "c/ca.crt").write_bytes((made / "ca.crt").read_bytes())
    assert "is not a certificate of" in certs.check(tmp_path / "c")[-1]


@pytest.mark.parametrize("name", ["../x", "North", "a b", "", "-x"])
def test_names_that_could_be_paths_are_refused(tmp_path: Path, name: str) -> None:
    from server.cli import main

    done = CliRunner().invoke(main, ["certs", "--out", str(tmp_path / "c"), "--clinic", name])
    assert done.exit_code == 1 and "cannot name a clinic" in done.output
    assert not (tmp_path / "c").exists()
