"""LLaVA-Med's published question files, fetched so that a cut costs little and a wrong file is noticed.

Names and sizes are those of the LLaVA-Med release (its README, 2023), in MiB and approximate; the release names no
hashes. Its pictures: `server.data_images`. The VQA pictures come with their own releases (`server.data_build`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model import files
from server.data_fetch import Fetcher
from server.data_jobs import Job, Outcome

BASE_URL = "https://hanoverprod.z21.web.core.windows.net/med_llava"
_TOLERANCE = 0.01  # the release gives sizes with two decimals of a MiB


@dataclass(frozen=True)
class Published:
    """A file of the release: short name, path below the base address, MiB (None: not known), SHA-256 ("" likewise)."""

    name: str
    path: str
    mib: float | None = None
    sha256: str = ""


PUBLISHED = (
    Published("alignment", "alignment/llava_med_alignment_500k.json", 341.52),
    Published("instruct-10k", "instruct/llava_med_instruct_10k.json", 19.24),
    Published("instruct-60k", "instruct/llava_med_instruct_60k.json", 84.65),
    Published("instruct-60k-inline", "instruct/llava_med_instruct_60k_inline_mention.json", 83.61),
    Published("captions", "instruct/llava_med_instruct_fig_captions.json", 161.39),
    Published("eval-questions", "eval/llava_med_eval_qa50_qa.jsonl", 256.18 / 1024),
    Published("eval-captions", "eval/llava_med_eval_qa50_fig_captions.json"),
    Published("eval-answers", "eval/llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch.json"),
    Published("image-list", "llava_med_image_urls.jsonl", 122.82),
    Published("eval-image-list", "multimodal_chat_eval/llava_med_test_image_urls.jsonl"),
)


def published_jobs(
    fetcher: Fetcher, out: Path, wanted: Iterable[Published], base_url: str = BASE_URL, any_size: bool = False
) -> list[Job]:
    """One job a file of the release, checked for room on the disk before anything is asked for. Raises DiskFull."""
    jobs, total = [], 0
    for item in wanted:
        place = out / item.path
        place.parent.mkdir(parents=True, exist_ok=True)
        total += 0 if place.exists() else int((item.mib or 1) * 2**20)
        jobs.append(_published_job(fetcher, place, item, f"{base_url.rstrip('/')}/{item.path}", any_size))
    fetcher.room(out, total)
    return jobs


def _published_job(fetcher: Fetcher, place: Path, item: Published, url: str, any_size: bool) -> Job:
    def run() -> Iterator[Outcome]:
        if place.exists():
            yield Outcome(item.path, "kept", bytes=place.stat().st_size)
            return
        arrived = place.with_name(place.name + ".unchecked")
        requests = 0 if arrived.exists() else fetcher.fetch(url, arrived)
        size, sha256 = arrived.stat().st_size, files.sha256_file(arrived)
        reason = _fault(arrived, item, size, sha256, any_size)
        if reason:
            arrived.unlink()
            yield Outcome(item.path, "refused", f"{url} {reason}", size, sha256, requests)
            return
        arrived.rename(place)
        yield Outcome(item.path, "done", "", size, sha256, requests)

    return run


def _fault(path: Path, item: Published, size: int, sha256: str, any_size: bool) -> str:
    """Why an arrived file is not the published one, or ""."""
    with open(path, "rb") as source:
        start = source.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
    if not start.startswith((b"[", b"{")):
        return "is not JSON (a page in place of the file?); check the address."
    if item.sha256 and sha256 != item.sha256:
        return f"has SHA-256 {sha256}, not {item.sha256}; it was changed or damaged, and is not kept."
    if item.mib and not any_size and abs(size / 2**20 / item.mib - 1) > _TOLERANCE:
        return f"has {size / 2**20:.2f} MiB, not about {item.mib:.2f}; if the release has changed, add --any-size."
    return ""
