"""A disk that can lose power: an apsw VFS that knows which bytes were flushed and what a cut may leave of the rest.

At a cut every flushed byte is there; each later write may be there whole, torn after 512 bytes, or missing, in any
order. A deleted file stays deleted only if its folder was flushed with the deletion, otherwise it may come back: that
is what `synchronous=EXTRA` is for. Does not model lying disks, bad sectors, or several files of other programs.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

SECTOR = 512


class Disk:
    """What is certain (`flushed`), what is underway (`pending`), and which deletions were not flushed (`ghosts`)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.flushed: dict[str, bytes] = {}
        self.pending: dict[str, list[tuple[int, bytes | None]]] = {}
        self.ghosts: dict[str, bytes] = {}
        self.before_step: Callable[[], None] = lambda: None

    def after_cut(self, folder: Path) -> None:
        """Write into `folder` the files as a machine might find them that lost its power just now."""
        returned = {path: data for path, data in self.ghosts.items() if self.random.random() < 0.5}
        for path, data in {**returned, **self.flushed}.items():
            content = bytearray(data)
            for offset, written in self.pending.get(path, []):
                if self.random.random() < 0.5:
                    self._apply(content, offset, written)
            (folder / Path(path).name).write_bytes(content)

    def _apply(self, content: bytearray, offset: int, written: bytes | None) -> None:
        """One un-flushed write that happened to reach the disk, perhaps torn; None is a truncation."""
        if written is None:
            del content[offset:]
            return
        kept = written[: self.random.choice([len(written), SECTOR])]
        content.extend(bytes(max(0, offset + len(kept) - len(content))))
        content[offset : offset + len(kept)] = kept


class CutVFS(apsw.VFS):
    """Passes everything to the real file system and keeps book in a `Disk`."""

    def __init__(self, name: str, disk: Disk) -> None:
        super().__init__(name, "")
        self.disk = disk

    def xOpen(self, name: Any, flags: list[int]) -> "CutFile":
        return CutFile(name, flags, self.disk)

    def xDelete(self, name: str, syncdir: bool) -> None:
        self.disk.before_step()
        super().xDelete(name, syncdir)
        data = self.disk.flushed.pop(name, None)
        self.disk.pending.pop(name, None)
        if syncdir:
            self.disk.ghosts.pop(name, None)
        elif data is not None:
            self.disk.ghosts[name] = data


class CutFile(apsw.VFSFile):
    """A file whose writes are underway until it is flushed. A file never flushed is not there after a cut."""

    def __init__(self, name: Any, flags: list[int], disk: Disk) -> None:
        super().__init__("", name, flags)
        self.path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.disk = disk

    def xWrite(self, data: bytes, offset: int) -> None:
        self.disk.before_step()
        super().xWrite(data, offset)
        self.disk.pending.setdefault(self.path, []).append((offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        self.disk.before_step()
        super().xTruncate(size)
        self.disk.pending.setdefault(self.path, []).append((size, None))

    def xSync(self, flags: int) -> None:
        self.disk.before_step()
        super().xSync(flags)
        self.disk.flushed[self.path] = Path(self.path).read_bytes()
        self.disk.pending[self.path] = []
        self.disk.ghosts.pop(self.path, None)
