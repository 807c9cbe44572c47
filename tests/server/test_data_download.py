"""Downloads against a local web server that cuts, refuses and lies, and archives that try to write elsewhere."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.data_download import Published, published_jobs
from server.data_fetch import DiskFull, Fetcher, FetchError, Stopped
from server.data_images import Picture, picture_jobs, read_list
from server.data_jobs import REPORT, Outcome, Summary, run_jobs
from tests.server.web import Site, serve

BODY = b"[" + bytes(range(48, 58)) * 30000 + b"]"


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as found:
        yield found


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    with httpx.Client(follow_redirects=True, timeout=10, trust_env=False) as client:
        yield Fetcher(client, tries=3, pause=0.001, keep_free=0)


def tar(*members: tuple[str, Any], zipped: bool = True) -> bytes:
    """An archive of (name, bytes or a TarInfo type with its link target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if zipped else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return out.getvalue()


def picture(site: Site, member: str = "PMC1/a.jpg", pair: str = "p1", path: str = "/oa/PMC1.tar.gz") -> Picture:
    return Picture(site.url + path, member, pair)


def run(fetcher: Fetcher, out: Path, pictures: list[Picture], **more: Any) -> Summary:
    jobs, _ = picture_jobs(fetcher, out, pictures, **more)
    return run_jobs(fetcher, jobs, out, 2)


def report(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / REPORT).read_text().splitlines()]


def test_a_cut_download_goes_on_where_it_was(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/a"] = BODY
    site.cut["/a"] = 110_000
    assert fetcher.fetch(f"{site.url}/a", tmp_path / "a") == 3
    assert (tmp_path / "a").read_bytes() == BODY
    assert site.ranges("/a") == ["", "bytes=110000-", "bytes=220000-"]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a"]


def test_a_new_process_goes_on_but_not_with_another_version(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/a"], site.cut["/a"] = BODY, 0
    with pytest.raises(FetchError, match="failed 3 times"):
        fetcher.fetch(f"{site.url}/a", tmp_path / "a")
    (tmp_path / "a.partial").write_bytes(BODY[:1000])
    site.cut.clear()
    fetcher.fetch(f"{site.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY
    assert site.ranges("/a")[-1] == "bytes=1000-"
    (tmp_path / "b.partial").write_bytes(b"old")
    (tmp_path / "b.partial.tag").write_text('"0"')
    site.files["/b"] = BODY
    fetcher.fetch(f"{site.url}/b", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BODY


@pytest.mark.parametrize("no_range", [True, False])
def test_servers_without_ranges_and_parts_that_are_whole(
    site: Site, fetcher: Fetcher, tmp_path: Path, no_range: bool
) -> None:
    site.files["/a"], site.no_range = BODY, no_range
    (tmp_path / "a.partial").write_bytes(BODY)
    fetcher.fetch(f"{site.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY
    (tmp_path / "c.partial").write_bytes(BODY + b"too long")
    site.files["/c"] = BODY
    fetcher.fetch(f"{site.url}/c", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == BODY


def test_busy_servers_are_asked_again_and_missing_files_are_not(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/a"] = BODY
    site.statuses["/a"] = [503, 429]
    assert fetcher.fetch(f"{site.url}/a", tmp_path / "a") == 3
    with pytest.raises(FetchError, match="HTTP 404") as caught:
        fetcher.fetch(f"{site.url}/none", tmp_path / "none")
    assert caught.value.missing
    assert len(site.ranges("/none")) == 1
    with pytest.raises(FetchError, match="no address"):
        fetcher.fetch("ftp://host/file", tmp_path / "none")


def test_a_full_disk_and_a_stop_end_at_once(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/a"] = BODY
    fetcher.keep_free = 1 << 60
    with pytest.raises(DiskFull, match="GiB free"):
        fetcher.fetch(f"{site.url}/a", tmp_path / "a")
    fetcher.keep_free, fetcher.largest = 0, 100
    with pytest.raises(FetchError, match="at most 100"):
        fetcher.fetch(f"{site.url}/a", tmp_path / "a")
    fetcher.largest = 1 << 30
    fetcher.stop.set()
    with pytest.raises(Stopped):
        fetcher.fetch(f"{site.url}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_published_files_are_checked_kept_and_reported(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    mib = len(BODY) / 2**20
    site.files |= {"/d/good.json": BODY, "/d/hash.json": BODY, "/d/size.json": BODY, "/d/page.json": b"<html>"}
    wanted = [
        Published("good", "d/good.json", mib * 1.005, hashlib.sha256(BODY).hexdigest()),
        Published("hash", "d/hash.json", None, "0" * 64),
        Published("size", "d/size.json", mib * 1.02),
        Published("page", "d/page.json"),
        Published("gone", "d/gone.json"),
    ]
    summary = run_jobs(fetcher, published_jobs(fetcher, tmp_path, wanted, site.url), tmp_path, 3)
    assert summary.counts == {"done": 1, "refused": 3, "missing": 1}
    assert {line["name"]: line["state"] for line in report(tmp_path)}["d/good.json"] == "done"
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["good.json"]
    asked = len(site.asked)
    again = published_jobs(fetcher, tmp_path, [wanted[0], wanted[2]], site.url, any_size=True)
    assert run_jobs(fetcher, again, tmp_path, 1).counts == {"kept": 1, "done": 1}
    assert len(site.asked) == asked + 1


def test_pictures_come_out_of_their_archives_and_no_archive_stays(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/oa/PMC1.tar.gz"] = tar(("PMC1/x.xml", b"x"), ("./PMC1/a.jpg", b"A" * 999), ("PMC1/b.jpg", b"B"))
    site.files["/oa/PMC2.tar.gz"] = tar(("PMC2/c.jpg", b"C"), zipped=False)
    wanted = [
        picture(site),
        picture(site, "PMC1/a.jpg", "same"),
        picture(site, "PMC1/b.jpg", "p2"),
        picture(site, "PMC1/none.jpg", "p3"),
        picture(site, "PMC2/c.jpg", "p4", "/oa/PMC2.tar.gz"),
        picture(site, "PMC9/c.jpg", "p5", "/oa/PMC9.tar.gz"),
    ]
    assert run(fetcher, tmp_path, wanted).counts == {"done": 4, "missing": 2}
    names = sorted(p.name for p in tmp_path.iterdir() if p.name != "afya-home")
    assert names == [REPORT, "p1.jpg", "p2.jpg", "p4.jpg", "same.jpg"]
    assert (tmp_path / "same.jpg").read_bytes() == b"A" * 999
    assert len(site.ranges("/oa/PMC1.tar.gz")) == 1
    done = next(line for line in report(tmp_path) if line["name"] == "p2.jpg")
    assert (done["bytes"], done["sha256"]) == (1, hashlib.sha256(b"B").hexdigest())
    site.asked.clear()
    (tmp_path / "p2.jpg").unlink()
    jobs, kept = picture_jobs(fetcher, tmp_path, wanted)
    assert (len(jobs), kept) == (2, 3)
    assert run_jobs(fetcher, jobs, tmp_path, 2).counts == {"done": 1, "missing": 2}
    assert not site.ranges("/oa/PMC2.tar.gz")


def test_what_a_killed_run_left_is_used_or_swept(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    content = site.files["/oa/PMC1.tar.gz"] = tar(("PMC1/a.jpg", b"A"), ("PMC1/b.jpg", b"B"))
    waiting = tmp_path / f".{hashlib.sha256(picture(site).tar_url.encode()).hexdigest()[:20]}.tar"
    waiting.write_bytes(content)
    orphans = [tmp_path / f".{'0' * 20}.tar{end}" for end in ("", ".partial", ".partial.tag")]
    for path in [*orphans, tmp_path / "a.jpg.partial"]:
        path.write_bytes(b"x")
    assert run(fetcher, tmp_path, [picture(site, pair="a")]).counts == {"done": 1}
    assert site.asked == []
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"a.jpg", REPORT}


def names_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("../evil.jpg", b"x", "outside"),
        ("/etc/evil.jpg", b"x", "outside"),
        ("a/../../evil.jpg", b"x", "outside"),
        ("link.jpg", (tarfile.SYMTYPE, "/etc/hostname"), "not a plain file"),
        ("hard.jpg", (tarfile.LNKTYPE, "other"), "not a plain file"),
        ("pipe.jpg", (tarfile.FIFOTYPE, ""), "not a plain file"),
        ("device.jpg", (tarfile.CHRTYPE, ""), "not a plain file"),
        ("folder.jpg", (tarfile.DIRTYPE, ""), "not a plain file"),
        ("large.jpg", b"x" * 2000, "at most 1000"),
        ("empty.jpg", b"", "is empty"),
    ],
)
def test_malicious_members_are_refused_and_write_nothing(
    site: Site, fetcher: Fetcher, tmp_path: Path, name: str, content: Any, word: str
) -> None:
    before = names_below(tmp_path)
    out = tmp_path / "in/out"
    out.mkdir(parents=True)
    site.files["/oa/PMC1.tar.gz"] = tar(("../other.jpg", b"y"), (name, content), ("good.jpg", b"g"))
    summary = run(fetcher, out, [picture(site, name), picture(site, "good.jpg", "good")], largest=1000)
    assert summary.counts == {"refused": 1, "done": 1}
    assert word in summary.examples[0].reason
    assert names_below(tmp_path) - before == {"in/out/good.jpg", f"in/out/{REPORT}"}


def long_name() -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    return gzip.compress(info.tobuf() + b"a" * 4096)


@pytest.mark.parametrize(
    "data",
    [b"no archive at all", tar(("PMC1/x", b"q" * 99999), ("PMC1/a.jpg", b"A"))[:120], long_name()],
    ids=["none", "cut", "long name"],  # bytes of gzip hold the time, so they cannot name a test
)
def test_damaged_archives_are_fetched_anew_once_then_reported(
    site: Site, fetcher: Fetcher, tmp_path: Path, data: bytes
) -> None:
    site.files["/oa/PMC1.tar.gz"] = data
    site.files["/oa/PMC2.tar.gz"] = tar(("c.jpg", b"C"))
    out = tmp_path / "out"
    summary = run(fetcher, out, [picture(site), picture(site, "c.jpg", "p2", "/oa/PMC2.tar.gz")])
    assert summary.counts == {"failed": 1, "done": 1}
    assert len(site.ranges("/oa/PMC1.tar.gz")) == 2
    assert names_below(out) == {"p2.jpg", REPORT}


def test_a_mirror_replaces_the_host(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/m/oa/1.tar.gz"] = tar(("a", b"A"))
    jobs, _ = picture_jobs(fetcher, tmp_path, [Picture("https://far.invalid/oa/1.tar.gz", "a", "p")], f"{site.url}/m/")
    assert run_jobs(fetcher, jobs, tmp_path, 1).counts == {"done": 1}


def test_lists_with_bad_lines_give_the_others(tmp_path: Path) -> None:
    row = {"pmc_tar_url": "https://h/x.tar.gz", "image_file_path": "a.jpg", "pair_id": "p_1"}
    bad = [{}, row | {"pair_id": "../x"}, row | {"pair_id": ".x"}, row | {"pmc_tar_url": "file:///etc/x"}]
    bad.append(row | {"pmc_tar_url": "http://[broken"})
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join([json.dumps(row), "{", *map(json.dumps, bad), "", json.dumps(row | {"pair_id": "q"})]))
    pictures, refused = read_list(path)
    assert [p.pair_id for p in pictures] == ["p_1", "q"]
    assert [o.name for o in refused] == [f"list.jsonl line {n}" for n in range(2, 8)]
    assert [p.pair_id for p in read_list(path, {"q"})[0]] == ["q"]


def test_ctrl_c_stops_in_order_and_the_next_run_goes_on(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    for n in range(6):
        site.files[f"/oa/{n}.tar.gz"] = tar(("a.jpg", b"%d" % n))
    wanted = [picture(site, "a.jpg", f"p{n}", f"/oa/{n}.tar.gz") for n in range(6)]
    jobs, _ = picture_jobs(fetcher, tmp_path, wanted)

    def interrupt(_: Outcome) -> None:
        raise KeyboardInterrupt

    summary = run_jobs(fetcher, jobs, tmp_path, 1, interrupt)
    assert "goes on" in summary.stopped
    fetcher.stop.clear()
    run(fetcher, tmp_path, wanted)
    assert {p.name for p in tmp_path.glob("*.jpg")} == {f"p{n}.jpg" for n in range(6)}


def test_a_full_disk_ends_the_run_with_its_sentence(site: Site, fetcher: Fetcher, tmp_path: Path) -> None:
    site.files["/oa/PMC1.tar.gz"] = tar(("PMC1/a.jpg", b"A"))
    fetcher.keep_free = 1 << 60
    summary = run(fetcher, tmp_path, [picture(site)])
    assert "GiB free" in summary.stopped
    assert summary.counts == {}
