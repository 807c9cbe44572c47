"""What of a picture's header and of a person's words may go on: an allow-list of fields, and a scan of free text.

`safe_fields` keeps a short list of technical DICOM fields, each only as a number or as one of a closed list of words,
so that no text a person typed can pass, whatever field it was typed into. `training_use` judges the flag that says
names are burned into the pixels. `identifiers` finds what looks like a name, date, number, phone, address or mail in a
sentence; it errs on the side of finding.

Not covered: writing in the pixels where the header does not announce it, recognisable faces, names that no title,
label or caret announces, languages other than English (with some Swahili and Chinese labels). No scan is perfect.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Fields = dict[str, str | int | float]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBERS: Final = {
    "rows": "Rows", "columns": "Columns", "bits_allocated": "BitsAllocated", "bits_stored": "BitsStored",
    "pixel_representation": "PixelRepresentation", "samples_per_pixel": "SamplesPerPixel",
    "rescale_slope": "RescaleSlope", "rescale_intercept": "RescaleIntercept", "slice_thickness_mm": "SliceThickness",
    "kvp": "KVP", "magnetic_field_tesla": "MagneticFieldStrength",
}  # fmt: skip
"""Numeric fields that are kept: our name and DICOM's keyword."""
PAIRS: Final = {"pixel_spacing_mm": "PixelSpacing", "imager_pixel_spacing_mm": "ImagerPixelSpacing"}
"""Row and column distance; kept as "<name>_row" and "<name>_column"."""
WORDS: Final = {
    "modality": ("Modality", _words(
        "AR ASMT AU BDUS BI BMD CR CT CTPROTOCOL DG DOC DX ECG EEG EMG ES FID GM HC HD IO IOL IVOCT IVUS KER KO LEN LS "
        "MG MR M3D NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN PR PT PX REG RF RG RTDOSE RTIMAGE RTPLAN "
        "RTRECORD RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC")),
    "photometric": ("PhotometricInterpretation", frozenset((
        "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"))),
    "laterality": ("Laterality", _words("L R B U")),
    "image_laterality": ("ImageLaterality", _words("L R B U")),
    "view_position": ("ViewPosition", _words(
        "AP PA LL RL RLD LLD RLO LLO LAT LATERAL MLO CC ML LM LMO XCC XCCL XCCM FB SIO ISO CV OBL OBLIQUE")),
    "body_part": ("BodyPartExamined", _words(
        "ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS "
        "CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COCCYX COLON CSPINE "
        "CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER FOOT GALLBLADDER HAND "
        "HEAD HEADNECK HEART HIP HUMERUS ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE "
        "LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NOSE ORBIT OVARY PANCREAS PAROTID PATELLA "
        "PELVIS PENIS PHARYNX PROSTATE RECTUM RIB SACRUM SCALP SCAPULA SCROTUM SHOULDER SKULL SPINE SPLEEN "
        "SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THUMB THYMUS THYROID TLSPINE TOE TONGUE TRACHEA "
        "TSPINE UPRARM URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA")),
    "burned_in_annotation": ("BurnedInAnnotation", _words("YES NO")),
    "lossy_compressed": ("LossyImageCompression", _words("00 01")),
}  # fmt: skip
"""Coded fields that are kept, each with the only words (DICOM PS3.3 and PS3.16 Annex L) that may pass."""


def safe_fields(dataset: Dataset) -> Fields:
    """The allow-listed technical fields of a DICOM header; everything else, and every other word, is left out."""
    from model.voi import number

    fields: Fields = {}
    for name, keyword in NUMBERS.items():
        found = number(dataset, keyword)
        if found is not None and abs(found) < 1e9:
            fields[name] = int(found) if found == int(found) else found
    for name, keyword in PAIRS.items():
        for end, value in zip(("row", "column"), _pair(dataset, keyword), strict=False):
            fields[f"{name}_{end}"] = value
    for name, (keyword, allowed) in WORDS.items():
        word = _word(dataset, keyword)
        if word in allowed:
            fields[name] = word
    return fields


def _pair(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in dataset.get(keyword) or ())
    except (ValueError, TypeError, OverflowError, NotImplementedError, AttributeError):
        return ()
    return values if len(values) == 2 and all(math.isfinite(v) and 0 < v < 1000 for v in values) else ()


def _word(dataset: Dataset, keyword: str) -> str:
    try:
        value = dataset.get(keyword)
    except (ValueError, TypeError, NotImplementedError, AttributeError, LookupError):
        return ""
    return value.strip().upper() if isinstance(value, str) else ""


class TrainingUse(NamedTuple):
    """Whether a picture may be used for training as far as its header tells: `sentence` explains "ask" and "refuse"."""

    verdict: Literal["allow", "ask", "refuse"]
    sentence: str


OFTEN_WRITTEN_ON: Final = _words("US SC XA RF ES OT DG XC IVUS GM OP")
"""Modalities whose pictures often carry the patient's name: without a flag, a person has to look."""


def training_use(fields: Mapping[str, str | int | float]) -> TrainingUse:
    """Judge a decoded picture's `fields` (see `model.images.Picture`) before it may enter a training folder."""
    flag = fields.get("burned_in_annotation")
    if flag == "YES":
        return TrainingUse(
            "refuse",
            "The picture's header says that writing is burned into it, so it cannot be used for training; "
            "it can still be asked about.",
        )
    if flag != "NO" and fields.get("modality") in OFTEN_WRITTEN_ON:
        return TrainingUse(
            "ask", "Pictures of this kind often carry a name in the image; look at it and confirm that it shows none."
        )
    return TrainingUse("allow", "")


class Finding(NamedTuple):
    """A part of a text that looks like an identifier: its kind and where it stands, text[start:end]."""

    kind: str
    start: int
    end: int


_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)[a-z]*\.?"
_NAME = r"[A-ZÀ-Þ][\w'’.-]+(?:\s+[A-ZÀ-Þ][\w'’.-]*){0,3}"
_PATTERNS: Final = tuple(
    (kind, re.compile(pattern, flags))
    for kind, pattern, flags in (
        ("mail", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.I),
        ("web", r"\bhttps?://\S+|\bwww\.\S+", re.I),
        ("address in a network", r"\b\d{1,3}(?:\.\d{1,3}){3}\b", 0),
        ("date", r"\b\d{1,4}\s?[-/.]\s?\d{1,2}\s?[-/.]\s?\d{1,4}\b"
                 r"|\b(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\b", 0),
        ("date", rf"\b\d{{1,2}}(?:st|nd|rd|th)?(?:\s+of)?[\s-]+{_MONTH}(?:[\s,-]+\d{{2,4}})?\b", re.I),
        ("date", rf"\b{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s*\d{{4}}\b)?", re.I),
        ("date", r"\d{2,4}\s*年(?:\s*\d{1,2}\s*月)?(?:\s*\d{1,2}\s*日)?|\d{1,2}\s*月\s*\d{1,2}\s*日", 0),
        ("birth", r"\b(?:d\.?o\.?b\.?|born(?:\s+(?:on|in))?|birth\s?(?:day|date)|date of birth)\b[\s:]*[\w/.,-]+",
         re.I),
        ("phone", r"(?<![\w.])\+?\(?\d{1,4}\)?(?:[\s().-]{1,2}\d{2,4}){2,5}(?![\w.])", 0),
        ("number", r"\b(?=[A-Za-z-]{0,4}\d)[A-Za-z]{0,4}-?\d{6,}[A-Za-z]?\b|\b\d{3}-\d{2}-\d{4}\b", 0),
        ("number", r"\b(?:mrn|nhs|ssn|nhif|huduma|passport|accession|hospital|patient|file|record|case|id)\b\s*"
                   r"(?:id|no\.?|number|num|#)?\s*[:#=]?\s*(?=[\w/-]*\d)[\w/-]{3,}", re.I),
        ("age over 89", r"\b(?:9\d|1[0-2]\d)[\s-]*(?:y/?o|yrs?|years?)\b|\b(?:aged?|age:)\s*(?:9\d|1[0-2]\d)\b", re.I),
        ("name", r"\b[A-Za-zÀ-ÿ'’-]+(?:\^[A-Za-zÀ-ÿ'’ -]*)+", 0),
        ("name", rf"\b(?:[Mm]rs?|[Mm]s|[Mm]iss|[Mm]aster|[Dd]r|[Dd]octor|[Pp]rof|[Ss]ister|[Nn]urse|[Bb]wana|[Bb]i"
                 rf"|[Mm]zee|[Mm]ama|MR|MRS|MS|DR)\b\.?\s+{_NAME}", 0),
        ("name", rf"(?:\b[Pp]atient(?:'s)?(?:\s+[Nn]ame)?|\b[Nn]ame[ds]?|\b[Nn]amed|\b[Cc]alled|\b[Jj]ina)"
                 rf"(?:\s+(?:is|la|ni))?\s*[:=]?\s+{_NAME}", 0),
        ("name", r"(?:姓名|患者|病人|病患)\s*[::]\s*\S{2,4}", 0),
        ("address", r"\b\d{1,5}\s+(?:[A-Z][\w'’.-]+\s+){1,4}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Close|Way"
                    r"|Boulevard|Blvd|Square|Court|Ct)\b|\bP\.?\s?O\.?\s?Box\s+\d+", 0),
    )
)  # fmt: skip


def identifiers(text: str) -> list[Finding]:
    """Everything in `text` that looks like it identifies a person, in order; empty for text that may be kept."""
    found = {
        Finding(kind, match.start(), match.end()) for kind, pattern in _PATTERNS for match in pattern.finditer(text)
    }
    return sorted(found, key=lambda f: (f.start, -f.end, f.kind))
