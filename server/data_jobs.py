"""Downloads side by side: each outcome counted and written to the report as it comes, ended in order by Ctrl-C.

A job is a function that yields the outcomes of the files it is for; `server.data_download` and `server.data_images`
make them.
"""

import errno
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from server.data_fetch import DiskFull, Fetcher, FetchError, Stopped

REPORT = "download-report.jsonl"
STOPPED = "Stopped; the same command goes on where it was."


@dataclass(frozen=True)
class Outcome:
    """What happened to one file: state is done, kept (was there), missing, failed or refused."""

    name: str
    state: str
    reason: str = ""
    bytes: int = 0
    sha256: str = ""
    requests: int = 0


@dataclass
class Summary:
    """Outcomes by state, whether the user or a full disk ended the run, and the first failures."""

    counts: dict[str, int] = field(default_factory=dict)
    stopped: str = ""
    examples: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.counts[outcome.state] = self.counts.get(outcome.state, 0) + 1
        if outcome.state not in ("done", "kept") and len(self.examples) < 5:
            self.examples.append(outcome)


Job = Callable[[], Iterable[Outcome]]


def run_jobs(
    fetcher: Fetcher,
    jobs: Iterable[Job],
    out: Path,
    workers: int,
    tick: Callable[[Outcome], None] = lambda _: None,
    early: Iterable[Outcome] = (),
) -> Summary:
    """Run jobs side by side, writing each outcome to the report as it comes; Ctrl-C and a full disk end it in order.

    `early` are outcomes known before; they are reported, too. `tick` hears each outcome of a job.
    """
    summary = Summary()
    done: queue.Queue[Outcome | BaseException] = queue.Queue()
    threads = _start(fetcher, jobs, workers, done)
    crash: BaseException | None = None
    with open(out / REPORT, "a", encoding="utf-8") as report:
        for outcome in early:
            record(outcome, report, summary)
        while any(thread.is_alive() for thread in threads) or not done.empty():
            try:
                found = done.get(timeout=0.1)
                if isinstance(found, Outcome):
                    record(found, report, summary)
                    tick(found)
                elif isinstance(found, DiskFull):
                    summary.stopped = str(found)
                elif not isinstance(found, Stopped):
                    crash = crash or found
            except queue.Empty:
                continue
            except KeyboardInterrupt:
                fetcher.stop.set()
                summary.stopped = STOPPED
    if crash:
        raise crash
    return summary


def record(outcome: Outcome, report: IO[str], summary: Summary) -> None:
    """Count one outcome and write it as a line of the report."""
    summary.add(outcome)
    report.write(json.dumps(asdict(outcome) | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
    report.flush()


def _start(fetcher: Fetcher, jobs: Iterable[Job], workers: int, done: Any) -> list[threading.Thread]:
    """Workers that share the jobs and put what happens into `done`."""
    source, lock = iter(list(jobs)), threading.Lock()
    threads = [threading.Thread(target=_work, args=(fetcher, source, lock, done), daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    return threads


def _work(fetcher: Fetcher, source: Iterator[Job], lock: Any, done: Any) -> None:
    """One worker: takes jobs until there are none or the stop flag is set; a fault ends all workers."""
    try:
        while not fetcher.stop.is_set():
            with lock:
                job = next(source, None)
            if job is None:
                return
            try:
                for outcome in job():
                    done.put(outcome)
            except FetchError as error:
                done.put(Outcome(str(error).split(" ")[0], "missing" if error.missing else "failed", str(error)))
    except BaseException as error:
        fetcher.stop.set()  # a full disk or a fault of ours: the others end, too
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        done.put(DiskFull(f"The disk is full ({error}); make room, what is there stays.") if full else error)
