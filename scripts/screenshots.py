"""Makes docs/screenshots/{new-case,cases,computer}.png from a real kiosk, a real model and synthetic pictures.

    .venv/bin/python scripts/screenshots.py [--model FOLDER] [--out docs/screenshots]

The cases are phantoms (`model.phantoms`): no patient is in them. The model really answers; answers that differ from the
phantom's known truth are corrected, as a clinic would. Needs a Chromium (AFYA_CHROMIUM names one).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from model.data import Sample

LIMIT = 300_000  # bytes of a screenshot: they live in the repository


def main() -> None:
    """Fill a kiosk, photograph its three screens."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help="folder of the model; unset: the one that comes with Afya")
    arguments.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots")
    chosen = arguments.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    from model import phantoms
    from tests.kiosk import browser

    samples = phantoms.make(10, ["plain", "soft", "sharp"], seed=5, size=320)
    with tempfile.TemporaryDirectory(prefix="afya-screenshots-") as folder:
        home = Path(folder) / "home"
        home.mkdir(mode=0o700)
        (home / "afya.toml").write_text('clinic = "Kisima Health Centre"\n')
        fill(home, str(chosen.model or ""), samples)
        requests: list[str] = []
        with browser.running(home, chosen.model) as kiosk, browser.page(requests) as page:
            photograph(page, kiosk.url, chosen.out)
    for path in sorted(chosen.out.glob("*.png")):
        assert path.stat().st_size < LIMIT, f"{path} is too large for the repository"
        print(path, path.stat().st_size // 1000, "kB")


def fill(home: Path, model: str, samples: "list[Sample]") -> None:
    """Ask the first questions of each picture, check the answers against the truth, and record consents."""
    import numpy as np

    from kiosk import export
    from kiosk.desk import open_desk
    from kiosk.records import NewImage
    from model import images
    from model.backends import Request

    desk = open_desk(home, model)
    groups = list(dict.fromkeys(sample.group for sample in samples))
    for number, group in enumerate(groups):
        rows = [sample for sample in samples if sample.group == group]
        picked = list({row.meta.get("topic", row.question): row for row in rows}.values())[: 3 if number % 3 else 2]
        case_id: int | None = None
        history: list[tuple[str, str]] = []
        for row in picked:
            rgb = np.asarray(row.image)  # a phantom's picture is an array, never a path
            new = NewImage(images.to_png(rgb), "PNG", 0, 1, {})
            if case_id is None:
                case_id, turn_id = desk.store.add_case(new, "NA", row.question)
            else:
                turn_id = desk.store.add_turn(case_id, row.question, "NA")
            job = desk.engine.submit(turn_id, Request(rgb, row.question, tuple(history)))
            text = "".join(desk.engine.stream(job))
            if number < len(groups) - 1 or row is not picked[-1]:
                right = text.strip().casefold() == row.answer.casefold()
                verdict = "confirmed" if right else "corrected"
                export.review(desk.store, home, turn_id, verdict, "NA", None if right else row.answer)
            history.append((row.question, row.answer))
        if case_id is not None and number % 4 != 3 and number < len(groups) - 1:
            export.set_consent(desk.store, home, case_id, "training", "NA", True)
    desk.engine.stop()
    desk.store.close()


def photograph(page: "Page", url: str, out: Path) -> None:
    """Open each screen with real content, wait until it is complete, and save it."""
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    out.mkdir(parents=True, exist_ok=True)
    page.goto(f"{url}/?by=NA&screen=cases")
    expect(page.get_by_role("button", name="Open case").nth(3)).to_be_visible()
    settle(page)
    page.screenshot(path=out / "cases.png")
    page.get_by_role("button", name="Open case").first.click()
    expect(page.get_by_text("May this case improve the model?")).to_be_visible()
    settle(page)
    page.screenshot(path=out / "new-case.png")
    page.get_by_role("button", name="This computer").click()
    expect(page.locator('[data-testid="stVegaLiteChart"]')).to_have_count(3)
    settle(page)
    page.screenshot(path=out / "computer.png")


def settle(page: "Page") -> None:
    """Wait until the model is loaded, the page has been drawn, and nothing of the page before is left on it."""
    from playwright.sync_api import expect

    expect(page.get_by_text("still loading")).to_have_count(0)
    expect(page.locator('[data-stale="true"]')).to_have_count(0)
    page.wait_for_timeout(2000)


if __name__ == "__main__":
    main()
