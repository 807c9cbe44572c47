"""The coordinator's page, as `streamlit run` starts it: clinics, rounds, rejections, releases. It only reads files.

Started by `afya-server page`, which passes the flags that keep it on this machine. Streamlit runs this file again at
every visit, so it shows what is in the files then. Everything that clinics wrote is shown as text, never as markup.
"""

import os
from pathlib import Path
from typing import Any

import streamlit as st

from server import status
from server.status import Clinic, Status
from server.status_cli import NOTHING, release_line

COLOURS = ("#0b6e5f", "#c2710c", "#4a5fa5", "#a53f5b", "#6b7a2f", "#7a4fa0")


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Afya federation", layout="wide")
    st.title("Federation", anchor=False)
    state = Path(os.environ.get("AFYA_SERVER_STATE", "federation"))
    rounds = os.environ.get("AFYA_SERVER_ROUNDS")
    try:
        found = status.read(state, Path(rounds) if rounds else None)
    except (OSError, ValueError) as error:
        st.error(f"The files of {state} cannot be read ({error}).")
        return
    if found.empty:
        st.info(NOTHING)
        return
    if found.trouble:
        st.warning(plain(found.trouble))
    if found.waiting:
        st.info(plain(found.waiting))
    _numbers(found)
    _clinics(found.clinics)
    _rounds(found)
    _accuracy(found.clinics)
    _refusals(found)
    _releases(found)
    st.button("Look again", icon=":material/refresh:")


def plain(text: str) -> str:
    """Text that Streamlit shows as it is, without markup, links or symbols."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]()<>#+-.!|~$:" else sign for sign in text)


def _numbers(found: Status) -> None:
    """The federation in six large numbers."""
    moved = sum(row.bytes_down + row.bytes_up for row in found.rounds) / 1e6
    taking = [clinic for clinic in found.clinics if clinic.accepted]
    figures = {
        "Clinics that took part": str(len(taking)),
        "Rounds with effect": str(sum(row.changed for row in found.rounds)),
        "Rounds without effect": str(sum(not row.changed for row in found.rounds)),
        "Rejections": str(len(found.refusals)),
        "Moved": f"{moved:.1f} MB",
        "Running": f"round {found.running}" if found.running else "nothing",
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)


def _clinics(clinics: list[Clinic]) -> None:
    """One row for each clinic."""
    st.subheader("Clinics", anchor=False)
    _table([_clinic_row(clinic) for clinic in clinics])


def _clinic_row(clinic: Clinic) -> dict[str, Any]:
    last = clinic.accuracy[-1] if clinic.accuracy else {}
    return {
        "clinic": clinic.name,
        "key": f"revoked {clinic.revoked[:10]}" if clinic.revoked else "registered" if clinic.registered else "unknown",
        "last seen (UTC)": _when(clinic.last_seen) or "never",
        "accepted": clinic.accepted,
        "rejected": clinic.rejected,
        "samples": clinic.examples,
        "patients": clinic.cases,
        "MB sent": round(clinic.bytes_up / 1e6, 2),
        "seconds training": round(clinic.seconds),
        "right % (sealed set)": last.get("candidate"),
        "installed": clinic.installed or "nothing",
    }


def _rounds(found: Status) -> None:
    """Loss, seconds and bytes over the rounds, and the rounds themselves."""
    st.subheader("Rounds", anchor=False)
    if not found.rounds:
        st.caption("No round has ended yet.")
        return
    loss, seconds, size = st.columns(3, gap="large")
    with loss:
        before = [(row.number, "before", row.loss_before) for row in found.rounds]
        _lines("Loss at the clinics", [*before, *((row.number, "after", row.loss_after) for row in found.rounds)])
    with seconds:
        _lines("Seconds a round", [(row.number, "seconds", row.seconds) for row in found.rounds])
    with size:
        down = [(row.number, "to the clinics", row.bytes_down / 1e6) for row in found.rounds]
        _lines("MB a round", [*down, *((row.number, "from the clinics", row.bytes_up / 1e6) for row in found.rounds)])
    names = ("number", "factor", "changed", "reason", "accepted", "rejected")
    rows = [{"ended (UTC)": _when(row.at), **{name: getattr(row, name) for name in names}} for row in found.rounds]
    with st.expander("All rounds"):
        _table(rows[::-1])


def _accuracy(clinics: list[Clinic]) -> None:
    """How right each candidate was on the clinics' sealed sets, where clinics gave counts."""
    rows = [(row["round"], clinic.name, row.get("candidate")) for clinic in clinics for row in clinic.accuracy]
    st.subheader("Accuracy on sealed sets", anchor=False)
    if rows:
        _lines("Right answers (%)", rows)
    else:
        st.caption("No clinic has given counts of its sealed set yet.")


def _refusals(found: Status) -> None:
    st.subheader("Rejections", anchor=False)
    if not found.refusals:
        st.caption("Nothing was rejected.")
        return
    rows = [{"at (UTC)": _when(r.at), "round": r.round, "clinic": r.clinic, "why": r.reason} for r in found.refusals]
    _table(rows[::-1])


def _releases(found: Status) -> None:
    st.subheader("Releases", anchor=False)
    if not found.releases:
        st.caption("Nothing was released yet.")
    for row in reversed(found.releases[-20:]):
        st.markdown(plain(release_line(row)))


def _when(at: str) -> str:
    return at[:16].replace("T", " ")


def _table(rows: list[dict[str, Any]]) -> None:
    import pandas

    st.dataframe(pandas.DataFrame(rows), hide_index=True, width="stretch")


def _lines(title: str, rows: list[tuple[int, str, float | None]]) -> None:
    """A line for each name over the rounds."""
    import altair
    import pandas

    data = pandas.DataFrame(rows, columns=["round", "what", "value"]).dropna()
    names = list(dict.fromkeys(data["what"]))
    legend = altair.Legend(orient="bottom") if len(names) > 1 else None
    colour = altair.Color("what:N", title=None, legend=legend)
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(names))]
    chart = altair.Chart(data, height=240).mark_line(point=len(data) < 60)
    st.markdown(f"**{title}**")
    st.altair_chart(
        chart.encode(
            x=altair.X("round:Q", title="round", axis=altair.Axis(tickMinStep=1, format="d")),
            y=altair.Y("value:Q", title=None, scale=altair.Scale(zero=True)),
            color=colour.scale(domain=names, range=colours),
        )
    )


main()
