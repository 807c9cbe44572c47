"""What all screens share: the header with its three buttons, who is at the computer, and the words for numbers.

The open screen, the open case and the initials are kept in the address (`?screen=cases&case=12&by=NA`), so reloading
the page or a browser that crashed comes back to the same place. Does not cover passwords: initials are a label.
"""

import functools
from datetime import datetime

import numpy as np
import streamlit as st

from kiosk.inference import Engine
from model.images import to_png

SCREENS = {
    "new": ("New case", ":material/add_a_photo:"),
    "cases": ("Cases", ":material/folder_open:"),
    "computer": ("This computer", ":material/monitor_heart:"),
}
VERDICT_WORDS = {"none": "not checked", "confirmed": "confirmed", "corrected": "corrected", "rejected": "rejected"}
CONSENT_WORDS = {
    "none": "consent not asked yet",
    "care": "no consent for training",
    "training": "may improve the model",
}
DISCLAIMER = "Decision support, never a diagnosis."
# Hides Streamlit's own top bar, uses the width of a small screen, and keeps the picture from filling the page.
_STYLE = """<style>
[data-testid="stHeader"] { display: none; }
[data-testid="stMainBlockContainer"] { padding: 1rem 2.2rem 2rem; max-width: 1500px; }
[data-testid="stMainBlockContainer"] > [data-testid="stVerticalBlock"] { gap: 0.7rem; }
[data-testid="stColumn"] > [data-testid="stVerticalBlock"] { gap: 0.5rem; }
[data-testid="stImage"] img { max-height: 56vh; object-fit: contain; border-radius: 0.6rem; }
[data-testid="stChatMessage"] { padding: 0.55rem 0.8rem; }
[data-testid="stChatMessage"] [data-testid="stVerticalBlock"] { gap: 0.35rem; }
[data-testid="stCaptionContainer"] p { color: #44565c; }
[data-testid="stCaptionContainer"] { opacity: 1; }
.stButton button, .stFormSubmitButton button { min-height: 2.8rem; }
[data-testid="stHeading"] { margin-bottom: 0.3rem; }
[data-testid="stChatMessage"] strong { font-size: 1.12rem; }
h1 { padding: 0 0 0.7rem !important; font-size: 1.9rem !important; }
h3 { padding: 0.3rem 0 0.5rem !important; font-size: 1.35rem !important; }
hr { margin: 0.2rem 0 0.4rem !important; }
</style>"""


def style() -> None:
    """Our few lines of style sheet; no font and no file from anywhere else."""
    st.html(_STYLE)


@functools.cache
def icon() -> bytes:
    """A white cross on green as PNG. Streamlit would fetch an icon that it knows by name from the internet."""
    drawn = np.full((64, 64, 3), (11, 110, 95), np.uint8)
    drawn[26:38, 12:52] = drawn[12:52, 26:38] = 255
    return to_png(drawn)


def screen() -> str:
    """The screen that is open: "new", "cases" or "computer"."""
    wanted = st.query_params.get("screen", "new")
    return wanted if wanted in SCREENS else "new"


def go(to: str, case_id: int | None = None) -> None:
    """Open a screen, with a case or none. Use as a button's `on_click`."""
    st.query_params["screen"] = to
    if case_id is not None:
        st.query_params["case"] = str(case_id)
    elif "case" in st.query_params:
        del st.query_params["case"]
    for name in ("picture", "correcting"):
        st.session_state.pop(name, None)
    st.session_state["upload_round"] = st.session_state.get("upload_round", 0) + 1  # empties the upload field


def open_case() -> int | None:
    """Number of the case that is open, or None."""
    number = st.query_params.get("case", "")
    return int(number) if number.isdecimal() and len(number) < 18 else None


def header(clinic: str) -> None:
    """Name, the three big buttons, and whose initials answers are signed with."""
    name, *buttons, person = st.columns([2.4, 1.5, 1.3, 1.7, 1.5], vertical_alignment="center")
    name.title("Afya", anchor=False)
    if clinic:
        name.caption(plain(clinic))
    for column, (key, (label, icon)) in zip(buttons, SCREENS.items(), strict=True):
        kind = "primary" if key == screen() else "secondary"
        column.button(label, icon=icon, key=f"go_{key}", type=kind, width="stretch", on_click=go, args=(key,))
    initials = st.query_params.get("by")
    if initials:
        person.button(f"{initials} · change", icon=":material/person:", key="leave", type="tertiary", on_click=_leave)
    st.divider()


def _leave() -> None:
    del st.query_params["by"]


def author() -> str | None:
    """Initials of the person at the computer; asks for them and returns None where they are not known yet."""
    initials = "".join(letter for letter in st.query_params.get("by", "") if letter.isalnum())[:8].upper()
    if initials:
        return initials
    with st.form("who", border=True, width=620):
        st.subheader("Who is using this computer?", anchor=False)
        typed = st.text_input("Your initials", max_chars=8, key="initials", placeholder="For example: NA")
        st.caption("They are saved with every question, answer check and consent you enter.")
        if st.form_submit_button("Start", type="primary"):
            typed = "".join(letter for letter in typed if letter.isalnum()).upper()
            if typed:
                st.query_params["by"] = typed
                st.rerun()
            st.error("Please type your initials: one to eight letters.")
    return None


def model_notice(engine: Engine) -> None:
    """A sentence at the top where the model needs one."""
    status = engine.status()
    if status.problem:
        st.error(f"{plain(status.problem)} Earlier cases can still be read; questions cannot be answered now.")
    elif status.notice:
        st.warning(plain(status.notice))
    elif status.state == "loading":
        _loading(engine)


@st.fragment(run_every=1.0)
def _loading(engine: Engine) -> None:
    """Stands there until the model is ready, and then takes itself away."""
    if engine.status().state != "loading":
        st.rerun()
    st.info("The model is still loading; a question asked now is answered as soon as it is ready.")


def when(utc: str) -> str:
    """`2026-11-23T14:05:09Z` as a person writes it, in this computer's time zone."""
    return f"{datetime.fromisoformat(utc).astimezone():%d %b %Y, %H:%M}"


def sureness(confidence: float) -> str:
    """The model's confidence (0 to 1) in words, with the number."""
    words = "very sure" if confidence >= 0.9 else "fairly sure" if confidence >= 0.7 else "unsure"
    return f"{'mostly guessing' if confidence < 0.4 else words} ({confidence:.0%})"


def megabytes(size: float | None) -> str:
    """A size for people: MB, or GB from 1,000 MB on; a dash where it is not known."""
    if size is None:
        return "–"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plain(text: str | None) -> str:
    """Text as it is: nothing in it is taken for Markdown, so an answer cannot draw links or pictures."""
    shown = "".join(letter if letter.isprintable() else " " for letter in (text or ""))
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#+-.!|~$:&" else letter for letter in shown)
