"""The kiosk's screens, as `streamlit run` starts them: one store, one model, three screens, and errors as sentences.

Started by `afya-kiosk start`, which passes the flags that keep it on this machine. What the screens show is in
`views.py` and `views_*.py`. Streamlit runs this file again at every click, so it holds no state of its own.
"""

import os
from pathlib import Path

import streamlit as st

from kiosk import views, views_ask, views_cases, views_computer
from kiosk.desk import Desk, open_desk
from kiosk.settings import SettingsError
from kiosk.store import StoreError
from model.files import home

SCREENS = {"new": views_ask.show, "cases": views_cases.show, "computer": views_computer.show}


@st.cache_resource(show_spinner=False)
def desk(folder: str, model: str, bits: str) -> Desk:
    """The open kiosk, made by whichever browser comes first and shared by all."""
    return open_desk(Path(folder), model, bits)


def main() -> None:
    """Draw the screen that is open now."""
    st.set_page_config(page_title="Afya", page_icon=views.icon(), layout="wide")
    views.style()
    try:
        this = desk(str(home()), os.environ.get("AFYA_MODEL", ""), os.environ.get("AFYA_BITS", ""))
    except (StoreError, SettingsError, OSError) as error:
        st.error(f"The kiosk cannot start. {error}")
        return
    views.header(this.settings.clinic)
    author = views.author()
    if author is None:
        return
    views.model_notice(this.engine)
    try:
        SCREENS[views.screen()](this, author)
    except StoreError as error:
        st.error(str(error))


main()
