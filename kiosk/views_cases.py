"""The screen "Cases": find an earlier case by words, date or check, and open it again."""

from datetime import UTC, date, datetime, time

import streamlit as st

from kiosk import queries, views
from kiosk.desk import Desk
from kiosk.records import Case

PAGE = 10  # cases shown before "Show more"
CHECKS = {
    "Any": "",
    "Not checked yet": "none",
    "Confirmed": "confirmed",
    "Corrected": "corrected",
    "Rejected": "rejected",
}


def show(desk: Desk, author: str) -> None:
    """Draw the search fields and the list, newest first."""
    words, dates, check = st.columns([3, 2, 1.6])
    text = words.text_input("Search in questions and answers", key="search", placeholder="For example: lung")
    days = dates.date_input("Between these days", value=(), key="search_days", format="DD/MM/YYYY")
    verdict = CHECKS[check.selectbox("Answer checked?", list(CHECKS), key="search_verdict")]
    since, until = _moments(tuple(days) if isinstance(days, tuple | list) else (days,))
    shown = st.session_state.get("cases_shown", PAGE)
    found = queries.search(desk.store, queries.Filter(text, since, until, verdict), limit=shown + 1)
    if not found:
        st.info("No case matches." if text or since or verdict else "There is no case yet. Press New case to begin.")
        return
    for case in found[:shown]:
        _row(desk, case)
    if len(found) > shown:
        st.button("Show more", key="more", on_click=_more, args=(shown + PAGE,))


def _moments(days: tuple[date, ...]) -> tuple[str, str]:
    """The chosen local days as UTC moments, the first's beginning to the last's end; empty where none is chosen."""
    if not days:
        return "", ""
    edges = datetime.combine(days[0], time.min), datetime.combine(days[-1], time.max)
    first, last = (edge.astimezone().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for edge in edges)
    return first, last


def _more(shown: int) -> None:
    st.session_state["cases_shown"] = shown


def _row(desk: Desk, case: Case) -> None:
    """One case: picture, what was asked and answered, how it was checked, and a button to open it."""
    with st.container(border=True):
        picture, text, state, button = st.columns([1, 5, 2.6, 1.3], vertical_alignment="center")
        picture.image(queries.image(desk.store, case.id), width=96)
        for turn in case.turns[:2]:
            answer = turn.final_answer if turn.status == "answered" else "not answered"
            text.markdown(f"{views.plain(turn.question)} **{views.plain(answer) or '(empty answer)'}**")
        if len(case.turns) > 2:
            text.caption(f"and {len(case.turns) - 2} more")
        state.caption(f"Case {case.id} · {views.when(case.created_at)} · {case.author}")
        state.caption(f"Answers {_checks(case)} · {views.CONSENT_WORDS[case.consent]}")
        button.button("Open case", key=f"open_{case.id}", width="stretch", on_click=views.go, args=("new", case.id))


def _checks(case: Case) -> str:
    """The verdicts of a case in words, each once."""
    return ", ".join(dict.fromkeys(views.VERDICT_WORDS[turn.verdict] for turn in case.turns))
