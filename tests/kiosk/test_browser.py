"""A clinic's day in a real Chromium: a CT is uploaded, asked about, corrected, consented to, and found again.

The kiosk runs as `afya-kiosk start` starts it, with the tiny model, in a process of its own, and is stopped and started
in between. Whatever the browser asks for is checked to stay on this machine.
"""

import json
import re
from pathlib import Path

import psutil
import pytest
from pydicom.data import get_testdata_file

from kiosk import queries, safety
from kiosk.store import CaseStore
from tests.kiosk import browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.chromium() is None, reason="no Chromium here: install one or set AFYA_CHROMIUM"),
]
QUESTION = "Which organ is the grey part in the middle?"
PATIENCE = 60_000  # milliseconds; generous, because a busy machine is no error


def test_a_case_from_upload_to_reopening(tiny: Path, afya_home: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    requests: list[str] = []
    with browser.page(requests) as page:
        with browser.running(afya_home, tiny, tmp_path / "first.log") as kiosk:
            assert listening(kiosk.pid) == {"127.0.0.1"}
            page.goto(kiosk.url)
            page.get_by_label("Your initials").fill("na")
            page.get_by_role("button", name="Start").click()
            expect(page.get_by_text("Add a picture first.")).to_be_visible()
            assert page.get_by_text("Deploy").count() == 0
            too_large(page, tmp_path)
            ct = get_testdata_file("CT_small.dcm")
            page.locator('input[type="file"]').first.set_input_files(ct)
            expect(page.get_by_text("CT · DICOM")).to_be_visible()
            question = page.get_by_test_id("stChatInputTextArea")
            question.fill(QUESTION)
            question.press("Enter")
            page.get_by_role("button", name="Correct").click()
            page.get_by_label("The right answer").fill("the spleen")
            page.get_by_role("button", name="Save correction").click()
            expect(page.get_by_text("Corrected by NA")).to_be_visible()
            page.get_by_role("button", name="Yes, use it").click()
            expect(page.get_by_text("1 checked answer of this case will be used.")).to_be_visible()
            assert outside(kiosk.pid) == set()
        with browser.running(afya_home, tiny, tmp_path / "second.log") as kiosk:
            page.goto(f"{kiosk.url}/?by=BO")
            page.get_by_role("button", name="Cases").click()
            search = page.get_by_label("Search in questions and answers")
            search.fill("SPLEEN")
            search.press("Enter")
            expect(page.get_by_text(re.compile("Case 1 · .* · NA"))).to_be_visible()
            page.get_by_role("button", name="Open case").click()
            expect(page.get_by_role("heading", name="Questions and answers")).to_be_visible()
            # a busy machine shows the former screen's list for a while beside the new one
            expect(page.get_by_label("Search in questions and answers")).to_have_count(0, timeout=PATIENCE)
            expect(page.get_by_text(QUESTION, exact=True)).to_be_visible()
            expect(page.get_by_text("the spleen")).to_be_visible()
            page.reload()
            expect(page.get_by_text("Corrected by NA")).to_be_visible()
            page.get_by_role("button", name="This computer").click()
            expect(page.get_by_text("Seconds until the first word")).to_be_visible()
            expect(page.locator('[data-testid="stVegaLiteChart"]')).to_have_count(3)
            assert outside(kiosk.pid) == set()
    assert requests and [url for url in requests if browser.off_this_machine(url)] == []
    for log in ("first.log", "second.log"):
        assert "Traceback" not in (tmp_path / log).read_text()
    what_is_kept(afya_home)


def too_large(page: "browser.Page", folder: Path) -> None:
    """A file of 51 MB is refused before it is sent."""
    from playwright.sync_api import expect

    big = folder / "big.dcm"
    big.touch()
    with open(big, "rb+") as out:
        out.truncate(51 * 2**20)
    page.locator('input[type="file"]').first.set_input_files(big)
    expect(page.get_by_text(re.compile("50.*MB or smaller"))).to_be_visible()


def what_is_kept(home: Path) -> None:
    """The case as it lies on the disk, and the one sample it became."""
    assert safety.verify(home / "kiosk.db").problems == ()
    store = CaseStore(home / "kiosk.db")
    turn = queries.case(store, 1).turns[0]
    store.close()
    assert (turn.question, turn.correction, turn.reviewed_by, turn.asked_by) == (QUESTION, "the spleen", "NA", "NA")
    assert turn.answer is not None and turn.bits == 4 and turn.first_token_seconds and turn.base_sha256
    (sample,) = (home / "training" / "samples").iterdir()
    row = json.loads(sample.read_text())
    assert (row["answer"], row["answer_type"]) == ("the spleen", "open")
    assert (home / "training" / row["image"]).read_bytes().startswith(b"\x89PNG")


def listening(pid: int) -> set[str]:
    """Addresses on which a process waits for connections."""
    return {found.laddr.ip for found in psutil.Process(pid).net_connections("inet") if found.status == "LISTEN"}


def outside(pid: int) -> set[str]:
    """Addresses off this machine that a process talks to."""
    found = psutil.Process(pid).net_connections("inet")
    return {connection.raddr.ip for connection in found if connection.raddr and connection.raddr.ip != "127.0.0.1"}
