"""The sealed set of a clinic: never trained on, chosen by the clinic's own key, and closed once it has begun."""

import json
from pathlib import Path

import numpy as np
import pytest

from client import limits, sealed
from model.data import Sample


def samples(pictures: int, first: int = 0, questions: int = 2) -> list[Sample]:
    blank = np.zeros((4, 4, 3), np.uint8)
    return [
        Sample(f"{number}-{q}", blank, "Is it?", "yes", "closed", f"p{number}", "kiosk")
        for number in range(first, first + pictures)
        for q in range(questions)
    ]


def opened(home: Path, rows: list[Sample]) -> set[str]:
    """Pictures that a round trains on, written down as such."""
    rest = sealed.open_to_training(home, rows)
    sealed.note_training(home, rest)
    return groups(rest)


def groups(rows: list[Sample]) -> set[str]:
    return {row.group for row in rows}


def test_a_tenth_is_sealed_and_is_never_trained_on_while_the_clinic_grows(afya_home: Path) -> None:
    trained: set[str] = set()
    for pictures in (10, 19, 20, 300, 600):
        rows = samples(pictures)
        trained |= opened(afya_home, rows)
        if pictures < sealed.MIN_PICTURES:
            assert trained == groups(rows)
        if pictures >= 300:
            closed = groups(sealed.sealed(afya_home, rows))
            assert not closed & trained and 0.05 * pictures < len(closed) < 0.16 * pictures
            assert closed <= groups(rows) - trained


def test_what_was_trained_on_before_stays_open_and_what_is_sealed_stays_sealed(afya_home: Path) -> None:
    few = samples(19)
    opened(afya_home, few)
    many = samples(500)
    closed = groups(sealed.sealed(afya_home, many))
    assert closed and not closed & groups(few)
    opened(afya_home, many)
    assert groups(sealed.sealed(afya_home, many)) == closed
    assert closed <= groups(sealed.sealed(afya_home, [*many, *samples(100, 500)]))


def test_pictures_stay_sealed_when_few_are_left_for_a_while(afya_home: Path) -> None:
    many = samples(200)
    closed = groups(sealed.sealed(afya_home, many))
    few = [row for row in many if row.group in closed][: sealed.MIN_PICTURES - 1]
    assert opened(afya_home, few) == set()
    assert groups(sealed.sealed(afya_home, many)) == closed


def test_looking_for_what_may_be_trained_on_marks_nothing_and_a_round_that_was_overtaken_is_refused(
    afya_home: Path,
) -> None:
    few = samples(sealed.MIN_PICTURES - 1)
    assert groups(sealed.open_to_training(afya_home, few)) == groups(few)
    closed = groups(sealed.sealed(afya_home, samples(400)))
    assert closed & groups(few), "one of the few belongs to the sealed tenth"
    with pytest.raises(limits.Refused, match="began while this round"):
        sealed.note_training(afya_home, few)
    assert groups(sealed.sealed(afya_home, samples(400))) == closed


def test_each_clinic_seals_other_pictures_and_the_key_is_its_own(tmp_path: Path) -> None:
    found = []
    for name in ("north", "south"):
        (tmp_path / name).mkdir(mode=0o700)
        found.append(groups(sealed.sealed(tmp_path / name, samples(400))))
        assert (tmp_path / name / sealed.FILE).stat().st_mode & 0o777 == 0o600
    assert found[0] != found[1]


def test_a_key_that_was_given_at_the_start_seals_the_same_pictures_and_replaces_none(tmp_path: Path) -> None:
    rows, homes = samples(40), [tmp_path / name for name in ("one", "two")]
    for home in homes:
        home.mkdir()
        sealed.begin(home, b"k" * 32)
    opened = [groups(sealed.open_to_training(home, rows)) for home in homes]
    assert opened[0] == opened[1] and len(opened[0]) < 40
    sealed.begin(homes[0], b"other" * 8)
    assert groups(sealed.open_to_training(homes[0], rows)) == opened[0]


def test_a_small_sealed_set_gives_no_counts_and_a_damaged_seal_trains_nothing(afya_home: Path) -> None:
    with pytest.raises(limits.Refused, match="counts leave this clinic from 20 questions on 3 pictures"):
        sealed.sealed(afya_home, samples(40, questions=1))
    assert len(sealed.sealed(afya_home, samples(4000, questions=3))) == sealed.MAX_ROWS
    (afya_home / sealed.FILE).write_text("{")
    for call in (sealed.open_to_training, sealed.sealed):
        with pytest.raises(limits.Refused, match="damaged"):
            call(afya_home, samples(100))


def test_a_seal_of_the_version_before_that_had_begun_stays_closed(afya_home: Path) -> None:
    many = samples(200)
    opened(afya_home, many)
    closed = groups(sealed.sealed(afya_home, many))
    record = json.loads((afya_home / sealed.FILE).read_bytes())
    del record["begun"]
    (afya_home / sealed.FILE).write_text(json.dumps(record))
    few = [row for row in many if row.group in closed][:18]
    assert opened(afya_home, few) == set()


def test_a_seal_of_the_version_before_that_had_not_begun_begins_with_enough_pictures(afya_home: Path) -> None:
    (afya_home / "privacy").mkdir(mode=0o700)
    (afya_home / sealed.FILE).write_text(json.dumps({"key": "11" * 32, "trained": []}))
    assert opened(afya_home, samples(10)) == groups(samples(10))
    assert groups(sealed.sealed(afya_home, samples(400)))
