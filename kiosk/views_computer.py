"""The screen "This computer": which model answers and why, memory and speed over time, what is stored, last backup."""

from datetime import datetime
from pathlib import Path

import streamlit as st

from kiosk import memlog, queries, views
from kiosk.desk import Desk

COLOURS = ("#0b6e5f", "#c2710c")


def show(desk: Desk, author: str) -> None:
    """Draw the figures and the plots."""
    _numbers(desk)
    _model(desk)
    rows = queries.memory_rows(desk.store)
    answers = [row for row in rows if row["event"] == "answer"]
    if not answers:
        st.info("Memory and speed appear here after the first answer.")
        return
    memory, first, speed = st.columns(3, gap="large")
    with memory:
        _plot("Memory in use (MB)", rows, {"whole kiosk": "rss_bytes", "most while answering": "peak_bytes"}, 1e-6)
    with first:
        _plot("Seconds until the first word", answers, {"seconds": "first_token_seconds"})
    with speed:
        _plot("Speed (word pieces per second)", answers, {"per second": "tokens_per_second"})


def _numbers(desk: Desk) -> None:
    """Counts, sizes and the last backup, as large numbers."""
    counts = queries.counts(desk.store)
    backup = queries.last_backup(desk.store)
    figures = {
        "Cases": str(counts.cases),
        "Questions answered": str(counts.answered),
        "Checked": str(counts.confirmed + counts.corrected + counts.rejected),
        "May improve the model": str(counts.shared),
        "Memory in use": views.megabytes(memlog.resident_bytes()),
        "All cases on disk": views.megabytes(queries.store_bytes(desk.store)),
    }
    for column, (label, value) in zip(st.columns(len(figures)), figures.items(), strict=True):
        column.metric(label, value)
    if backup:
        st.caption(f"Last backup: {views.when(backup['at'])}, to {backup['path']}")
    elif counts.cases:
        st.warning(
            "No backup was made yet. Ask the person who looks after this computer to run: afya-kiosk backup FILE"
        )


def _model(desk: Desk) -> None:
    """Which model, precision and adapter answer, and why."""
    status = desk.engine.status()
    with st.container(border=True):
        st.subheader("What answers", anchor=False)
        if status.backend is None:
            st.write(status.problem or "The model is still loading.")
            return
        chosen = Path(desk.settings.model).name
        name = f"The model {views.plain(chosen)}" if chosen else "The reference model that comes with Afya"
        bits = f"{desk.settings.bits} bits per weight"
        adapter = f"improved by the adapter {status.adapter}" if status.adapter else "without an adapter (as installed)"
        st.write(f"{name}, {bits}, {adapter}.")
        if status.unsigned:
            st.warning(f"This adapter is {status.unsigned}.")
        reason = views.plain((status.reason or "").rstrip("."))
        st.caption(f"Runs with {status.backend}, because {reason}. Questions waiting: {status.waiting}.")
        st.caption(f"{views.DISCLAIMER} No picture and no question leaves this computer.")


def _plot(title: str, rows: list[dict[str, object]], lines: dict[str, str], scale: float = 1.0) -> None:
    """A line for each column of the memory log, over the time of the measurements (this computer's clock)."""
    import altair
    import pandas

    here = datetime.now().astimezone().tzinfo
    moments = pandas.to_datetime([row["at"] for row in rows]).tz_convert(here).tz_localize(None)
    values = {
        label: pandas.to_numeric([row[column] for row in rows], errors="coerce") * scale
        for label, column in lines.items()
    }
    data = pandas.DataFrame({"at": moments, **values}).melt("at", var_name="what", value_name="value").dropna()
    span = (moments.max() - moments.min()).total_seconds() if len(moments) else 0
    clock = "%H:%M:%S" if span < 600 else "%H:%M" if span < 86_400 else "%d %b"
    colour = altair.Color("what:N", title=None, legend=altair.Legend(orient="bottom") if len(lines) > 1 else None)
    chart = altair.Chart(data, height=260).mark_line(point=len(rows) < 3)
    st.markdown(f"**{title}**")
    st.altair_chart(
        chart.encode(
            x=altair.X("at:T", title=None, axis=altair.Axis(format=clock, tickCount=4, labelOverlap=True)),
            y=altair.Y("value:Q", title=None, scale=altair.Scale(zero=True)),
            color=colour.scale(domain=list(lines), range=list(COLOURS[: len(lines)])),
        )
    )
