"""Under each answer: how sure the model is, and Confirm, Correct, Reject; under each case: the consent question.

Every button saves at once through `export`, which keeps the training folder equal to what was decided. Does not cover
a second opinion: the latest verdict of anyone counts, and only the latest is kept.
"""

import streamlit as st

from kiosk import export, queries, views
from kiosk.desk import Desk
from kiosk.records import Case, Consent, Turn

NOT_RELIANT = "The answer changes little when the picture is hidden: do not rely on it."
UNSURE = "It is not clear how much this answer depends on the picture."


def answer(desk: Desk, turn: Turn, author: str) -> None:
    """One saved answer with its confidence and its check."""
    if turn.verdict == "corrected":
        st.markdown(f"**{views.plain(turn.correction)}**")
    elif turn.verdict == "rejected":
        st.markdown(f"~~{views.plain(turn.answer)}~~")
    else:
        st.markdown(f"**{views.plain(turn.answer) or '(the model gave an empty answer)'}**")
    said = f"The model had answered: {views.plain(turn.answer) or 'nothing'}. " if turn.verdict == "corrected" else ""
    if turn.confidence is not None:
        said += f"The model is {views.sureness(turn.confidence)}. It can be sure and wrong."
    st.caption(said)
    if turn.reliance == "not image-reliant":
        st.warning(NOT_RELIANT, icon=":material/visibility_off:")
    elif turn.reliance == "unsure":
        st.caption(UNSURE)
    if st.session_state.get("correcting") == turn.id:
        _correct(desk, turn, author)
    elif turn.verdict == "none" or st.session_state.get("rechecking") == turn.id:
        _buttons(desk, turn, author)
    else:
        _checked(turn)


def _buttons(desk: Desk, turn: Turn, author: str) -> None:
    """Three big buttons; the first and the last save at once, the middle one opens a field."""
    with st.container(horizontal=True):
        st.button(
            "Confirm",
            icon=":material/check:",
            key=f"confirm_{turn.id}",
            on_click=_save,
            args=(desk, turn.id, "confirmed", author),
            help="The answer is right.",
        )
        st.button(
            "Correct",
            icon=":material/edit:",
            key=f"correct_{turn.id}",
            on_click=_set,
            args=("correcting", turn.id),
            help="Write the right answer.",
        )
        st.button(
            "Reject",
            icon=":material/close:",
            key=f"reject_{turn.id}",
            on_click=_save,
            args=(desk, turn.id, "rejected", author),
            help="The answer is wrong or of no use.",
        )


def _correct(desk: Desk, turn: Turn, author: str) -> None:
    """A field for the right answer."""
    with st.form(f"correction_{turn.id}", border=False):
        text = st.text_input(
            "The right answer", value=turn.correction or "", max_chars=500, key=f"correction_text_{turn.id}"
        )
        with st.container(horizontal=True):
            save = st.form_submit_button("Save correction", type="primary")
            back = st.form_submit_button("Back")
    if back:
        _set("correcting", None)
        st.rerun()
    if save:
        if not text.strip():
            st.error("Please write the right answer first.")
            return
        _save(desk, turn.id, "corrected", author, text)
        st.rerun()


def _checked(turn: Turn) -> None:
    """Who checked the answer, and the way to change it."""
    icon = {"confirmed": ":material/check_circle:", "corrected": ":material/edit:", "rejected": ":material/cancel:"}
    with st.container(horizontal=True, vertical_alignment="center"):
        at = views.when(turn.reviewed_at or "")
        text = f"{icon[turn.verdict]} {turn.verdict.capitalize()} by {turn.reviewed_by}, {at}"
        st.markdown(f":green[{text}]" if turn.verdict != "rejected" else f":red[{text}]", width="content")
        st.button("Change", key=f"change_{turn.id}", type="tertiary", on_click=_set, args=("rechecking", turn.id))


def _save(desk: Desk, turn_id: int, verdict: str, author: str, correction: str | None = None) -> None:
    export.review(desk.store, desk.home, turn_id, verdict, author, correction)
    _set("correcting", None)
    _set("rechecking", None)


def _set(name: str, value: int | None) -> None:
    st.session_state[name] = value


def consent(desk: Desk, case: Case, author: str) -> None:
    """Ask once per case; show what was said, by whom, what keeps an answer out, and the way back."""
    with st.container(border=True):
        st.markdown("**May this case improve the model?** The picture stays in this clinic.")
        latest = case.consents[-1] if case.consents else None
        if latest is not None and latest.state == "training":
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(f":green[:material/check_circle: Yes], {_recorded(latest)}", width="content")
                _decision(desk, case, author, "care", "Withdraw", ":material/undo:")
            _what_is_used(desk, case)
            return
        if latest is not None and latest.state == "care":
            st.markdown(f":material/block: No, {_recorded(latest)}")
        looked = True
        if export.needs_look(case.format, case.fields):
            looked = st.checkbox("I looked: no name is written in the picture.", key=f"looked_{case.id}")
        with st.container(horizontal=True):
            yes = "Yes, use it" if latest is None else "Change to yes"
            _decision(desk, case, author, "training", yes, ":material/volunteer_activism:", looked)
            if latest is None:
                _decision(desk, case, author, "care", "No", ":material/block:")
        st.caption("Ask the patient first. Only answers you confirmed or corrected are used.")


def _recorded(latest: Consent) -> str:
    return f"recorded by {latest.author}, {views.when(latest.at)}"


def _what_is_used(desk: Desk, case: Case) -> None:
    """How many answers of a consented case are used now, and why the others are not."""
    rows = queries.trainable(desk.store, case.id)
    reasons = [reason for row in rows if (reason := export.held_back(row))]
    used = len(rows) - len(reasons)
    if not rows:
        st.caption("Nothing is used yet: confirm or correct an answer first.")
    elif used:
        st.caption(f"{used} checked answer{'s' if used > 1 else ''} of this case will be used.")
    for reason in dict.fromkeys(reasons):
        st.warning(views.plain(reason))


def _decision(
    desk: Desk, case: Case, author: str, state: str, label: str, icon: str, looked: bool | None = None
) -> None:
    """A button that records a decision; with `looked` False it cannot be pressed yet."""
    args = (desk.store, desk.home, case.id, state, author, bool(looked))
    key = f"consent_{state}_{case.id}"
    st.button(label, icon=icon, key=key, disabled=looked is False, on_click=export.set_consent, args=args)
