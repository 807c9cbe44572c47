"""The screen "New case", also for a case opened again: picture, questions, answers to check, consent, top to bottom.

A case exists from its first question on, and is on the disk before the model sees it. A question that waits and that
nobody is answering (the power went, the kiosk was stopped) shows as "Not answered" and can be asked again.
"""

import hashlib
import threading
from typing import Any

import streamlit as st

from kiosk import queries, views, views_review
from kiosk.desk import Desk
from kiosk.inference import AnswerFailed
from kiosk.records import Case, NewImage, Turn
from model import images

FILE, CAMERA = "Choose a file", "Use the camera"
EXAMPLES = ("What part of the body is shown?", "What kind of image is this?", "Is anything abnormal?")


def show(desk: Desk, author: str) -> None:
    """Draw the open case, or the way to a new one."""
    case_id = views.open_case()
    if case_id is None:
        _new_case(desk, author)
    else:
        _case(desk, queries.case(desk.store, case_id), author)


def _new_case(desk: Desk, author: str) -> None:
    """Step 1: a picture; step 2: the first question, which saves the case."""
    left, right = st.columns([5, 6], gap="large")
    with left:
        st.subheader("1 · Picture", anchor=False)
        found = _choose_picture()
        if found is not None:
            picture, png = found
            if not _from_camera():  # there the photograph is seen already
                st.image(png, width="stretch")
            st.caption(describe(picture.format, picture.frame, picture.frames, picture.fields))
    with right:
        st.subheader("2 · Ask", anchor=False)
        if found is None:
            st.write("Add a picture first. Then ask about it here in your own words.")
            st.write("You can check each answer, and say whether the case may improve the model.")
            st.caption(f"{views.DISCLAIMER} Everything stays on this computer.")
            return
        question = _question_box()
    _prepare(desk, png, picture.rgb)
    if question:
        new = NewImage(png, picture.format, picture.frame, picture.frames, picture.fields)
        case_id, turn_id = desk.store.add_case(new, author, question)
        _submit(desk, turn_id, picture.rgb, question, ())
        views.go("new", case_id)
        st.rerun()


def _choose_picture() -> tuple[images.Picture, bytes] | None:
    """A file or a photograph, decoded and as a PNG without metadata; None until there is one that can be read."""
    round_ = st.session_state.get("upload_round", 0)
    st.segmented_control("Where is the picture?", (FILE, CAMERA), default=FILE, key=f"source_{round_}")
    if _from_camera():
        given = st.camera_input("Hold the picture in front of the camera", key=f"camera_{round_}")
    else:
        given = st.file_uploader(
            "X-ray, scan or photo: DICOM, PNG, JPEG, TIFF or WebP, up to 50 MB", key=f"file_{round_}"
        )
    if given is None:
        return None
    data = given.getvalue()
    found = _decoded(data, None)
    if found is not None and found[0].frames > 1:
        many = found[0].frames
        number = st.slider(f"This file holds {many} pictures. Which one?", 1, many, found[0].frame + 1)
        found = _decoded(data, number - 1) if number - 1 != found[0].frame else found
    return found


def _from_camera() -> bool:
    return bool(st.session_state.get(f"source_{st.session_state.get('upload_round', 0)}") == CAMERA)


def _decoded(data: bytes, frame: int | None) -> tuple[images.Picture, bytes] | None:
    """Decode once per picture and session; a picture that is refused shows one sentence."""
    digest = hashlib.sha256(data).hexdigest()
    cached: dict[tuple[str, int | None], tuple[images.Picture, bytes]] = st.session_state.get("picture", {})
    if (digest, frame) not in cached:
        try:
            picture = images.decode(data, frame=frame)
        except images.ImageRejected as error:
            st.error(f"This picture cannot be used. {views.plain(str(error))}")
            return None
        cached = {key: found for key, found in cached.items() if key == (digest, None)}  # at most two are kept
        cached[digest, frame] = (picture, images.to_png(picture.rgb))
        st.session_state["picture"] = cached
    return cached[digest, frame]


def _case(desk: Desk, case: Case, author: str) -> None:
    """A saved case: picture on the left; questions, checks and consent on the right."""
    png = queries.image(desk.store, case.id)
    left, right = st.columns([5, 6], gap="large")
    with left:
        st.subheader(f"Case {case.id}", anchor=False)
        st.image(png, width="stretch")
        origin = describe(case.format, case.frame, case.frames, case.fields)
        st.caption(f"{origin} · saved {views.when(case.created_at)} by {case.author}")
        st.button("Start a new case", icon=":material/add:", key="another", on_click=views.go, args=("new",))
    with right:
        st.subheader("Questions and answers", anchor=False)
        st.caption(views.DISCLAIMER)
        busy = False
        for turn in case.turns:
            busy = _turn(desk, case, turn, author, png) or busy
        if busy:
            return
        question = _question_box()
        _prepare(desk, png, None)
        if question:
            turn_id = desk.store.add_turn(case.id, question, author)
            _submit(desk, turn_id, images.decode(png).rgb, question, history(case.turns))
            st.rerun()
        if any(turn.status == "answered" for turn in case.turns):
            views_review.consent(desk, case, author)


def _turn(desk: Desk, case: Case, turn: Turn, author: str, png: bytes) -> bool:
    """One question with its answer. Streams it while it is being made; returns whether it is still waited for."""
    st.chat_message("user", avatar=":material/person:").markdown(views.plain(turn.question))
    with st.chat_message("assistant", avatar=":material/health_and_safety:"):
        if turn.status == "answered":
            views_review.answer(desk, turn, author)
            return False
        job = desk.engine.job(turn.id)
        if job is None:
            if turn.status == "pending" and queries.turn(desk.store, turn.id).status != "pending":
                st.rerun()  # the answer came between reading the case and asking for the job
            st.warning(
                f"Not answered. {views.plain(turn.problem) or 'The kiosk was stopped before the answer was ready.'}"
            )
            if st.button("Ask again", icon=":material/refresh:", key=f"again_{turn.id}"):
                desk.store.retry_turn(turn.id)
                _submit(desk, turn.id, images.decode(png).rgb, turn.question, history(case.turns, before=turn.id))
                st.rerun()
            return False
        st.button("Stop", icon=":material/stop:", key=f"stop_{turn.id}", on_click=desk.engine.cancel, args=(turn.id,))
        try:
            with st.spinner(f"Waiting for {job.ahead} question(s) before this one …" if job.ahead else "Looking …"):
                st.write_stream(views.plain(piece) for piece in desk.engine.stream(job))
        except AnswerFailed:
            pass  # the sentence is saved with the turn and shown when the page is drawn again, now
    st.rerun()
    return True


def _prepare(desk: Desk, png: bytes, rgb: Any) -> None:
    """Let the model look at the picture while the question is typed, once for each picture that is opened."""
    digest = hashlib.sha256(png).hexdigest()
    if st.session_state.get("prepared") != digest:
        st.session_state["prepared"] = digest
        if rgb is not None:
            desk.engine.prepare(rgb)
        else:  # decoding takes a process of its own: the page does not wait for it
            threading.Thread(target=lambda: desk.engine.prepare(images.decode(png).rgb), daemon=True).start()


def _submit(desk: Desk, turn_id: int, rgb: Any, question: str, earlier: tuple[tuple[str, str], ...]) -> None:
    """Hand a saved question to the model."""
    from model.backends import Request

    settings = desk.settings
    desk.engine.submit(turn_id, Request(rgb, question, earlier, settings.answer_tokens, settings.reliance))


def history(turns: tuple[Turn, ...], before: int | None = None) -> tuple[tuple[str, str], ...]:
    """Earlier questions of a case with the answers a person stands behind; rejected ones are left out."""
    used = (turn for turn in turns if turn.status == "answered" and turn.verdict != "rejected")
    return tuple((turn.question, turn.final_answer) for turn in used if before is None or turn.id < before)


def _question_box() -> str | None:
    """A field for a question and a few examples to press; returns what was asked, if anything."""
    asked = st.chat_input("Type your question and press Enter", key="question", max_chars=500)
    pressed = None
    with st.container(horizontal=True):
        for number, example in enumerate(EXAMPLES):
            if st.button(example, key=f"example_{number}"):
                pressed = example
    return (asked or "").strip() or pressed


def describe(kind: str, frame: int, frames: int, fields: Any) -> str:
    """One line about where a picture comes from, with the words a header uses: modality, body part, picture k of n."""
    parts = [str(fields[name]) for name in ("modality", "body_part", "view_position", "laterality") if fields.get(name)]
    parts.append(kind)
    if frames > 1:
        parts.append(f"picture {frame + 1} of {frames}")
    return " · ".join(parts)
