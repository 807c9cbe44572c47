"""The pictures of PMC articles that LLaVA-Med's questions are about, taken out of the articles' archives.

A picture list is JSON lines of `pmc_tar_url`, `image_file_path` (a member of that archive) and `pair_id` (LLaVA-Med's
llava_med_image_urls.jsonl); a picture becomes `pair_id`.jpg and the archive is deleted.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from model import files
from model.data import DataError
from server.data_fetch import Fetcher, FetchError, Stopped
from server.data_jobs import Job, Outcome
from server.data_tar import TarDamaged, extract

_PAIR_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # what may become a file's name


@dataclass(frozen=True)
class Picture:
    """One line of a picture list."""

    tar_url: str
    member: str
    pair_id: str


def read_list(path: Path, only: Collection[str] | None = None) -> tuple[list[Picture], list[Outcome]]:
    """Pictures of a list and a refusal for each line that cannot be used; `only` keeps these pair ids alone."""
    pictures, refused = [], []
    try:
        lines = open(path, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); fetch it first with --file image-list.") from error
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            picture = _picture(line)
            if isinstance(picture, str):
                refused.append(Outcome(f"{path.name} line {number}", "refused", picture))
            elif only is None or picture.pair_id in only:
                pictures.append(picture)
    return pictures, refused


def _picture(line: str) -> Picture | str:
    try:
        row = json.loads(line)
        found = Picture(str(row["pmc_tar_url"]), str(row["image_file_path"]), str(row["pair_id"]))
        scheme = urlsplit(found.tar_url).scheme
    except (ValueError, KeyError, TypeError) as error:
        return f"is not a row of pmc_tar_url, image_file_path and pair_id ({type(error).__name__})"
    if not _PAIR_ID.fullmatch(found.pair_id):
        return f"pair_id {found.pair_id[:60]!r} is no file name"
    if scheme not in ("http", "https"):
        return f"{found.tar_url[:100]!r} is no web address"
    return found


def picture_jobs(
    fetcher: Fetcher, out: Path, pictures: Iterable[Picture], tar_base: str = "", largest: int = 64 << 20
) -> tuple[list[Job], int]:
    """One job an archive that still has a missing picture, and how many pictures are there already.

    `tar_base` replaces scheme and host of every archive's address (a mirror); `largest` caps one picture's bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    there = {entry.name for entry in out.iterdir()}
    by_tar: dict[str, dict[str, list[str]]] = {}
    kept, seen = 0, set()
    for picture in pictures:
        name = f"{picture.pair_id}.jpg"
        if name in seen:
            continue
        seen.add(name)
        if name in there:
            kept += 1
            continue
        by_tar.setdefault(_moved(picture.tar_url, tar_base), {}).setdefault(picture.member, []).append(name)
    _sweep(out, there, by_tar)
    jobs = [_tar_job(fetcher, out, url, members, largest) for url, members in by_tar.items()]
    return jobs, kept


def _archive(url: str) -> str:
    """The name under which an archive waits for its pictures to be taken."""
    return f".{hashlib.sha256(url.encode()).hexdigest()[:20]}.tar"


def _sweep(out: Path, there: Collection[str], urls: Iterable[str]) -> None:
    """Delete what a killed run left of archives that nothing is wanted from any more."""
    needed = {_archive(url) for url in urls}
    for name in there:
        found = re.match(r"\.[0-9a-f]{20}\.tar(?=$|\.partial)", name)
        if found and found[0] not in needed:
            (out / name).unlink(missing_ok=True)


def _moved(url: str, base: str) -> str:
    parts = urlsplit(url)
    return f"{base.rstrip('/')}{parts.path}" if base else url


def _tar_job(fetcher: Fetcher, out: Path, url: str, members: dict[str, list[str]], largest: int) -> Job:
    """Fetch an archive, take its pictures, delete it. A picture wanted under two names is copied."""

    def run() -> Iterator[Outcome]:
        archive = out / _archive(url)
        first = {member: out / names[0] for member, names in members.items()}
        try:
            states, requests = _take(fetcher, url, archive, first, largest)
        except FetchError as error:
            state = "missing" if error.missing else "failed"
            yield from (Outcome(name, state, str(error)) for names in members.values() for name in names)
            return
        except TarDamaged as error:
            yield from _after_damage(out, members, f"{url}: {error}.")
            return
        for member, names in members.items():
            yield from _outcomes(out, names, f"{url} {member}", states[member], requests)

    return run


def _take(
    fetcher: Fetcher, url: str, archive: Path, members: dict[str, Path], largest: int
) -> tuple[dict[str, str], int]:
    """Fetch and extract; a damaged archive is fetched anew once. Returns what became of each member, and requests."""
    requests = 0
    for last in (False, True):
        requests += 0 if archive.exists() else fetcher.fetch(url, archive)
        try:
            states = extract(archive, members, largest, stopped=fetcher.stop.is_set)
        except TarDamaged:
            archive.unlink(missing_ok=True)
            if last:
                raise
        else:
            break
    if fetcher.stop.is_set():
        raise Stopped
    archive.unlink(missing_ok=True)
    return states, requests


def _after_damage(out: Path, members: dict[str, list[str]], reason: str) -> Iterator[Outcome]:
    for names in members.values():
        if (out / names[0]).exists():
            yield from _outcomes(out, names, "", "", 1)
        else:
            yield from (Outcome(name, "failed", reason) for name in names)


def _outcomes(out: Path, names: list[str], where: str, fault: str, requests: int) -> Iterator[Outcome]:
    state = "missing" if fault == "not in the archive" else "refused"
    for name in names:
        if fault:
            yield Outcome(name, state, f"{where} {fault}", requests=requests)
            continue
        data = (out / names[0]).read_bytes()
        if name != names[0]:
            files.write_atomic(out / name, data)
        yield Outcome(name, "done", "", len(data), files.sha256_file(out / name), requests)
