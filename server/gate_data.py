"""The server's own held-out data: a candidate examined in this process, at the precision of the kiosks.

Not here: keeping this data out of any training, which is up to whoever names it in `gate-data`.
"""

from pathlib import Path

from model.exam_counts import Counts
from server.settings import Settings, SettingsRejected


def examine(settings: Settings, installed: Path | None, candidate: Path) -> Counts:
    """Counts of the candidate beside the last release on `gate-data`. Raises SettingsRejected, ModelError."""
    from model import backend_choice, data, exam, manifest

    images = Path(settings.gate_images).expanduser() if settings.gate_images else None
    try:
        samples = data.read(Path(settings.gate_data).expanduser(), images)
        if len({sample.group for sample in samples}) < 2:
            raise SettingsRejected("gate-data needs questions on two pictures at least.")
        bits = None if manifest.is_quantized(settings.base) else settings.gate_bits
        backend = backend_choice.open_backend(settings.base, bits)
        used = backend_choice.bits_of(settings.base, bits)
        return exam.compare(backend, samples, installed, candidate, bits=used)
    except data.DataError as error:
        raise SettingsRejected(f"gate-data cannot be used: {error}") from error
