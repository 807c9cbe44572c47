"""The screens, driven without a browser: a case from picture to consent, to search, and every error one sentence."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from kiosk import desk as desks
from kiosk import inference, queries
from kiosk.desk import Desk
from tests.kiosk.conftest import picture, png
from tests.kiosk.fakes import BrightnessBackend, answer

APP = Path(__file__).resolve().parents[2] / "kiosk" / "app.py"


@pytest.fixture
def desk(afya_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """An open kiosk with the small backend; the app under test gets the same one."""
    monkeypatch.setattr(inference, "make_backend", lambda settings: BrightnessBackend())
    opened = desks.open_desk(afya_home)
    monkeypatch.setattr(desks, "open_desk", lambda *_: opened)
    yield opened
    opened.engine.stop()
    opened.store.close()


def app(**address: str) -> AppTest:
    test = AppTest.from_file(str(APP), default_timeout=20)
    for name, value in address.items():
        test.query_params[name] = value
    return check(test.run())


def check(test: AppTest) -> AppTest:
    assert not test.exception, test.exception[0].message
    return test


def texts(test: AppTest) -> str:
    parts = [
        element.value for kind in ("markdown", "caption", "info", "warning", "error") for element in getattr(test, kind)
    ]
    return "\n".join(parts).replace("\\", "")


def press(test: AppTest, key: str) -> AppTest:
    return check(test.button(key=key).click().run())


def ask(test: AppTest, words: str, image: bytes | None = None) -> AppTest:
    if image is not None:
        test.file_uploader[0].set_value(("scan.png", image, "image/png")).run()
    return check(test.chat_input[0].set_value(words).run())


def test_initials_are_asked_once(desk: Desk) -> None:
    test = app()
    assert [field.label for field in test.text_input] == ["Your initials"] and not test.chat_input
    test.button[-1].click().run()
    assert "Please type your initials" in texts(test)
    test.text_input[0].set_value("n.a.")
    check(test.button[-1].click().run())
    assert test.query_params["by"] == "NA" and not test.text_input


def test_from_picture_to_consent(desk: Desk, afya_home: Path) -> None:
    test = app(by="NA")
    assert "Add a picture first" in texts(test) and not test.chat_input
    ask(test, "Is it bright?", png(200))
    case = queries.case(desk.store, 1)
    assert (case.author, case.turns[0].question, case.turns[0].answer) == ("NA", "Is it bright?", "It is bright")
    assert test.query_params["case"] == "1"
    assert (
        "**It is bright**" in texts(test) and "fairly sure (83%)" in texts(test) and "never a diagnosis" in texts(test)
    )
    ask(test, "And the corner?")
    assert [turn.question for turn in queries.case(desk.store, 1).turns] == ["Is it bright?", "And the corner?"]
    press(test, "confirm_1")
    press(test, "correct_2")
    test.text_input(key="correction_text_2").set_value("The corner is darker")
    check(next(button for button in test.button if button.label == "Save correction").click().run())
    assert "Confirmed by NA" in texts(test) and "The model had answered: It is bright" in texts(test)
    assert test.button(key="consent_training_1").disabled  # an uploaded photograph: somebody has to look first
    check(test.checkbox(key="looked_1").check().run())
    press(test, "consent_training_1")
    assert "2 checked answers of this case will be used" in texts(test)
    assert len(list((afya_home / "training" / "samples").glob("*.json"))) == 2
    press(test, "consent_care_1")
    assert not list((afya_home / "training" / "samples").iterdir())
    assert [consent.state for consent in queries.case(desk.store, 1).consents] == ["training", "care"]


def test_an_example_question_is_one_press(desk: Desk) -> None:
    test = app(by="NA")
    test.file_uploader[0].set_value(("scan.png", png(20), "image/png")).run()
    press(test, "example_0")
    turn = queries.case(desk.store, 1).turns[0]
    assert turn.question == "What part of the body is shown?" and turn.answer == "It is dark"
    press(test, "another")
    assert "case" not in test.query_params and "Add a picture first" in texts(test)


def test_an_interrupted_question_reopens_as_not_answered_and_can_be_asked_again(desk: Desk) -> None:
    case_id, turn_id = desk.store.add_case(picture(), "NA", "Is it bright?")  # and then the power went
    test = app(by="BO", case=str(case_id))
    assert "Not answered. The kiosk was stopped" in texts(test)
    press(test, f"again_{turn_id}")
    assert queries.turn(desk.store, turn_id).answer == "It is bright" and "**It is bright**" in texts(test)


def test_an_answer_that_does_not_need_the_picture_says_so(desk: Desk) -> None:
    marks = {"not image-reliant": "do not rely on it", "unsure": "It is not clear", "image-reliant": ""}
    for mark, words in marks.items():
        case_id, turn_id = desk.store.add_case(picture(), "NA", "Is it bright?")
        desk.store.answer_turn(turn_id, replace(answer(), reliance=mark, reliance_nats=0.0))
        shown = texts(app(by="NA", screen="new", case=str(case_id)))
        assert (not words or words in shown) and ("do not rely" in shown) is (mark == "not image-reliant")


def test_what_people_and_models_write_is_never_taken_for_markup(desk: Desk) -> None:
    case_id, turn_id = desk.store.add_case(picture(), "NA", "![x](http://example.com/q.png) <b>bold?</b>")
    desk.store.answer_turn(turn_id, answer("![x](http://example.com/a.png)"))
    for screen in ("new", "cases"):
        test = app(by="NA", case=str(case_id), screen=screen)
        shown = [element.value for element in test.markdown if "example" in element.value]
        assert shown and not [text for text in shown if "![x]" in text or "<b>" in text]


def test_cases_are_found_and_opened_again(desk: Desk) -> None:
    for number in range(12):
        _, turn_id = desk.store.add_case(picture(), "NA", f"Question {number}?")
        desk.store.answer_turn(turn_id, answer("a lung" if number == 3 else "a heart"))
    desk.store.review(4, "rejected", "NA")
    test = app(by="NA", screen="cases")
    assert len([button for button in test.button if button.label == "Open case"]) == 10
    press(test, "more")
    assert len([button for button in test.button if button.label == "Open case"]) == 12
    check(test.text_input(key="search").set_value("LUNG").run())
    assert [button.key for button in test.button if button.label == "Open case"] == ["open_4"]
    assert "rejected" in texts(test)
    press(test, "open_4")
    assert "Question 3?" in texts(test) and test.query_params["case"] == "4"
    press(test, "go_cases")
    check(test.text_input(key="search").set_value("nothing like it").run())
    assert "No case matches" in texts(test)


def test_this_computer_shows_what_answers_and_plots_it(desk: Desk) -> None:
    test = app(by="NA", screen="computer")
    assert "appear here after the first answer" in texts(test)
    test = app(by="NA")
    ask(test, "Is it bright?", png(200))
    press(test, "go_computer")
    figures = {metric.label: metric.value for metric in test.metric}
    assert (figures["Cases"], figures["Questions answered"], figures["Checked"]) == ("1", "1", "0")
    assert "4 bits per weight, without an adapter" in texts(test) and "because it needs no weights" in texts(test)
    assert "No backup was made yet" in texts(test) and "unsigned" not in texts(test)
    desk.engine._adapters.unsigned = "unsigned: nobody vouches for the adapter"
    assert "This adapter is unsigned: nobody vouches" in texts(check(test.run()))


def test_a_file_that_is_no_picture_is_one_sentence(desk: Desk) -> None:
    test = app(by="NA")
    check(test.file_uploader[0].set_value(("notes.pdf", b"%PDF-1.7 nothing to see", "application/pdf")).run())
    assert "This picture cannot be used." in texts(test) and not test.chat_input


def test_an_unknown_case_or_screen_is_one_sentence(desk: Desk) -> None:
    assert "There is no case 77" in texts(app(by="NA", case="77"))
    assert "Add a picture first" in texts(app(by="NA", case="../../etc", screen="nowhere"))


def test_a_damaged_database_is_one_sentence(afya_home: Path) -> None:
    (afya_home / "kiosk.db").write_bytes(b"not a database at all" * 99)
    test = check(AppTest.from_file(str(APP), default_timeout=20).run())
    assert "The kiosk cannot start." in texts(test)


def test_an_answer_that_comes_while_the_page_is_drawn_is_shown(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    case_id, turn_id = desk.store.add_case(picture(), "NA", "Is it bright?")

    def job(_: int) -> None:  # finished between reading the case and this look
        desk.store.answer_turn(turn_id, answer("It is bright"))

    monkeypatch.setattr(desk.engine, "job", job)
    test = app(by="NA", case=str(case_id))
    assert "**It is bright**" in texts(test) and "Not answered" not in texts(test)
