"""Passports: signed over one spelling, bound to adapter and base, refused in one sentence for anything else."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from model import adapters, installed, passport
from model.adapters import AdapterRejected
from tests.model.signed import BASE, KEY, OTHER, TRAPS, adapter, at_once, pem, put, signed, trust


def test_a_valid_passport_is_taken_and_changes_no_hash(tmp_path: Path, afya_home: Path) -> None:
    folder = adapter(tmp_path / "a")
    before = adapters.sha256(folder)
    place = put(afya_home, folder, signed(folder, verdict="passed", summary="All well."))
    assert passport.check(afya_home, place) == passport.UNSIGNED  # no key is known yet
    trust(afya_home)
    assert passport.check(afya_home, place) is None
    assert adapters.sha256(place) == before and adapters.current(afya_home) == place
    page = (place / passport.TEXT).read_text()
    assert "examined and released" in page and before in page and "All well." in page
    assert passport.newest(afya_home) == 5


def tampered(text: str, **entries: object) -> str:
    found = json.loads(text)
    found["passport"] |= entries
    return json.dumps(found)


def test_whatever_is_not_signed_for_this_adapter_is_refused(tmp_path: Path, afya_home: Path) -> None:
    trust(afya_home)
    folder, other = adapter(tmp_path / "a"), adapter(tmp_path / "b", 0.2)
    place = put(afya_home, folder, signed(folder))
    good = signed(folder)
    bad = {
        "changed": tampered(good, verdict="passed"),
        "another key": signed(folder, OTHER),
        "not signed": passport.sign({"adapter_sha256": adapters.sha256(folder)}, None),
        "another adapter": signed(other),
        "another base": signed(folder, base_sha256="0" * 64),
        "not readable": good[:40],
        "readable": json.dumps({**json.loads(good), "signature": "!"}),
        "other format": tampered(good, format="afya-passport-2"),
        "list": "[]",
        "deep": "[" * 100_000,
    }
    for kind, text in bad.items():
        (place / passport.FILE).write_text(text)
        with pytest.raises(AdapterRejected) as caught:
            passport.check(afya_home, place)
        words = str(caught.value)
        assert words.count(".") == 1 and words.endswith("."), (kind, words)
    (place / passport.FILE).unlink()
    with pytest.raises(AdapterRejected, match="no readable passport"):
        passport.check(afya_home, place)


def test_a_signature_for_another_purpose_is_none(tmp_path: Path, afya_home: Path) -> None:
    import base64

    folder = adapter(tmp_path / "a")
    found = json.loads(signed(folder))
    raw = KEY.sign(passport.canonical(found["passport"]))
    text = json.dumps({**found, "signature": base64.b64encode(raw).decode()})
    with pytest.raises(AdapterRejected, match="changed or signed"):
        passport.verify(text, KEY.public_key(), adapters.sha256(folder), BASE)


@pytest.mark.parametrize("content", [b"", b"nonsense", pem(ec.generate_private_key(ec.SECP256R1()))])
def test_a_damaged_public_key_lets_nothing_pass(tmp_path: Path, afya_home: Path, content: bytes) -> None:
    folder = adapter(tmp_path / "a")
    place = put(afya_home, folder, signed(folder))
    trust(afya_home)
    (afya_home / "federation" / passport.PUBLIC).write_bytes(content)
    with pytest.raises(AdapterRejected, match=r"release\.pub"):
        passport.check(afya_home, place)


def test_a_bundle_brings_the_key_once_and_no_other_later(tmp_path: Path, afya_home: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    passport.adopt(afya_home, bundle)
    assert passport.trusted(afya_home) is None
    (bundle / passport.PUBLIC).write_bytes(pem(KEY))
    passport.adopt(afya_home, bundle)
    passport.adopt(afya_home, bundle)
    (bundle / passport.PUBLIC).write_bytes(pem(OTHER))
    with pytest.raises(AdapterRejected, match="ask the coordinator"):
        passport.adopt(afya_home, bundle)
    assert passport.name_of(passport.trusted(afya_home)) == passport.name_of(KEY.public_key())


def test_rollback_goes_to_signed_adapters_only_and_changes_nothing_otherwise(tmp_path: Path, afya_home: Path) -> None:
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b", 0.2)
    one, two = put(afya_home, first, None), put(afya_home, second, signed(second))
    trust(afya_home)
    assert passport.newest(afya_home) == 5
    with pytest.raises(AdapterRejected, match="no readable passport"):
        installed.rollback(afya_home)
    assert adapters.current(afya_home) == two
    passport.write(one, signed(first))
    assert installed.rollback(afya_home) == one.name and adapters.current(afya_home) == one
    assert installed.rollback(afya_home, two.name) == two.name and adapters.current(afya_home) == two
    with pytest.raises(AdapterRejected, match="no adapter"):
        installed.rollback(afya_home, "../../etc")
    rows = installed.listing(afya_home)
    assert [(row.name, row.current, row.problem) for row in rows] == sorted(
        [(one.name, False, None), (two.name, True, None)]
    )


@pytest.mark.parametrize("trap", TRAPS)
def test_a_passport_that_is_no_file_is_refused_at_once(tmp_path: Path, afya_home: Path, trap: object) -> None:
    trust(afya_home)
    folder = adapter(tmp_path / "a")
    place = put(afya_home, folder, signed(folder))
    trap(place / passport.FILE)
    with pytest.raises(AdapterRejected, match="no readable passport"):
        at_once(lambda: passport.check(afya_home, place))
    assert at_once(lambda: passport.newest(afya_home)) == 0


def test_the_page_shows_what_is_printable_and_never_breaks() -> None:
    from model.passport_text import page

    odd = {"summary": "\x1b[2Jgone", "rules": ["no", {"kept": False, "words": "a\nb"}], "places": [{"share": "x"}, 3]}
    text = page(odd, signed=False)
    assert "\x1b" not in text and "BROKEN a b" in text and "nobody vouches" in text
