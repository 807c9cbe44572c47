"""Keys and certificates of a federation: its own authority, the server's certificate, one node key for each clinic.

Elliptic curves throughout (P-256 for TLS, P-384 for the nodes, in OpenSSH's format as Flower wants it). Key files are
readable by their owner only. Not here: revocation lists; a clinic is shut out by removing its key from the server.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.files import write_atomic

CA_DAYS, SERVER_DAYS = 3650, 825  # ten years for the authority; 825 days is the most that common TLS software accepts
LOCAL = ("localhost", "127.0.0.1", "::1")
CLOCK_SKEW = datetime.timedelta(hours=1)  # clinics' clocks are not all right: valid a little before now
_CLINIC = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,40}[a-z0-9])?")


class CertsError(ValueError):
    """Keys or certificates cannot be made or used; the message says which file and what to do."""


def make(out: Path, clinics: Sequence[str], hosts: Sequence[str] = ()) -> list[Path]:
    """Write what is missing of ca.crt/key, server.pem/key and clinics/NAME/{node.key,node.pub,ca.crt} into `out`.

    What exists stays as it is, so clinics can be added later. `hosts` are the names and addresses under which clinics
    reach the server (default: this computer's own). Returns the files written. Raises CertsError, also where the
    server's certificate is there and lacks one of them.
    """
    for name in clinics:
        if not _CLINIC.fullmatch(name):
            raise CertsError(f"{name!r} cannot name a clinic; use small letters, digits and hyphens, at most 42.")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = [] if (out / "ca.crt").exists() else _authority(out)
    if not (out / "server.pem").exists():
        written += _server(out, hosts or LOCAL)
    elif lacking := [host for host in hosts if host not in server_names(out)]:
        raise CertsError(
            f"{out / 'server.pem'} is there already and does not name {lacking[0]}; remove it and run this again with "
            "every --host (clinics keep their files)."
        )
    for name in clinics:
        folder = out / "clinics" / name
        if not (folder / "node.key").exists():
            written += _node(folder, (out / "ca.crt").read_bytes())
    return written


def server_names(out: Path) -> list[str]:
    """Names and addresses in the server's certificate, in order."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate((out / "server.pem").read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in found]


def check(out: Path) -> list[str]:
    """Every fault of the files that a server needs, in plain sentences; an empty list means all is well."""
    from cryptography import x509

    faults = [
        f"{out / name} is missing" for name in ("ca.crt", "server.pem", "server.key") if not (out / name).exists()
    ]
    if faults:
        return [*faults, f"run `afya-server certs --out {out} --clinic NAME` first"]
    if (out / "server.key").stat().st_mode & 0o077:
        faults.append(f"{out / 'server.key'} can be read by others; run chmod 600 on it")
    try:
        certificate = x509.load_pem_x509_certificate((out / "server.pem").read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((out / "ca.crt").read_bytes()))
    except Exception as error:  # cryptography raises many kinds; each means the same to the person: not usable
        return [*faults, f"{out / 'server.pem'} is not a certificate of {out / 'ca.crt'} ({type(error).__name__})"]
    if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        faults.append(f"{out / 'server.pem'} has expired; remove it and run `afya-server certs` again")
    return faults


def _private(path: Path, data: bytes) -> Path:
    write_atomic(path, data)
    os.chmod(path, 0o600)
    return path


def _public(path: Path, data: bytes) -> Path:
    write_atomic(path, data)
    os.chmod(path, 0o644)
    return path


def _builder(subject: Any, issuer: Any, key: Any, days: int) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    rows = ((NameOID.ORGANIZATION_NAME, "Afya federation"), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in rows])


def _usage(**on: bool) -> Any:
    from cryptography import x509

    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(**{n: on.get(n, False) for n in f"{names} encipher_only decipher_only".split()})


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def _authority(out: Path) -> list[Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Afya federation authority")
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    return [_private(out / "ca.key", _pem(key)), _public(out / "ca.crt", public)]


def _server(out: Path, hosts: Sequence[str]) -> list[Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if not (out / "ca.key").exists():
        raise CertsError(
            f"{out / 'ca.key'} is not here; the server's certificate is made where the authority's key is."
        )
    authority = x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())
    signer: Any = serialization.load_pem_private_key((out / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_host(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = (
        _builder(_name(hosts[0]), authority.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(identifier, critical=False)
        .sign(signer, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    return [_private(out / "server.key", _pem(key)), _public(out / "server.pem", public)]


def _host(host: str) -> Any:
    """A name or an address as the certificate holds it. Raises CertsError."""
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?", host):
        raise CertsError(f"{host!r} is neither a host name nor an address.")
    return x509.DNSName(host)


def _node(folder: Path, ca: bytes) -> list[Path]:
    """A clinic's folder to hand over: its private key, its public key and the authority's certificate."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH) + b"\n"
    return [
        _public(folder / "node.pub", public),
        _public(folder / "ca.crt", ca),
        _private(folder / "node.key", private),
    ]
