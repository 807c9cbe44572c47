"""model.deid: what leaves a header, the burned-in flag, and what looks like an identifier in words."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from model import deid, images
from tests.model.made import dicom, item

SECRET = "MUTUA JANE"
SPARED = {"Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
          "PixelRepresentation"}  # fmt: skip


def planted() -> Dataset:
    """A data set with the secret in every text attribute that DICOM knows, also nested and private."""
    dataset = Dataset()
    for tag, entry in pydicom.datadict.DicomDictionary.items():
        if entry[0] in ("PN", "LO", "SH", "LT", "ST", "UT", "UC", "CS") and entry[4] and entry[4] not in SPARED:
            value = SECRET if entry[0] == "CS" else SECRET.title()
            dataset.add_new(tag, entry[0], value)
    dataset.RequestAttributesSequence = [item(ScheduledProcedureStepDescription=SECRET)]
    dataset.add_new(0x00091010, "LO", SECRET)
    return dataset


def test_no_text_passes_whatever_field_it_was_typed_into() -> None:
    dataset = planted()
    assert len(dataset) > 400
    assert deid.safe_fields(dataset) == {}


def test_technical_fields_pass_as_numbers_and_known_words() -> None:
    dataset = item(
        Modality="CT", BodyPartExamined="CHEST ", Rows=512, RescaleSlope="1.5", RescaleIntercept="-1024",
        Laterality="L", PixelSpacing=[0.5, 0.25], BurnedInAnnotation="NO", KVP="120", PatientName="Doe^Jane",
        PatientBirthDate="19700101", SliceThickness="",
    )  # fmt: skip
    assert deid.safe_fields(dataset) == {
        "modality": "CT", "body_part": "CHEST", "rows": 512, "rescale_slope": 1.5, "rescale_intercept": -1024,
        "laterality": "L", "pixel_spacing_mm_row": 0.5, "pixel_spacing_mm_column": 0.25, "burned_in_annotation": "NO",
        "kvp": 120,
    }  # fmt: skip


@pytest.mark.parametrize(("spacing", "kept"), [([0.5], 0), ([-1, 1], 0), ([5000, 1], 0), ([1, 2], 2)])
def test_spacing_must_make_sense(spacing: list[float], kept: int) -> None:
    assert len(deid.safe_fields(item(PixelSpacing=spacing))) == kept


@pytest.mark.parametrize(
    ("elements", "verdict"),
    [
        ({"Modality": "US", "BurnedInAnnotation": "YES"}, "refuse"),
        ({"Modality": "CT", "BurnedInAnnotation": "YES"}, "refuse"),
        ({"Modality": "US"}, "ask"),
        ({"Modality": "XA", "BurnedInAnnotation": "NO"}, "allow"),
        ({"Modality": "CT"}, "allow"),
    ],
)
def test_burned_in_writing_bars_training(elements: dict[str, str], verdict: str) -> None:
    picture = images.decode(dicom(np.eye(8, dtype=np.uint8), **elements))  # type: ignore[arg-type]
    judged = deid.training_use(picture.fields)
    assert judged.verdict == verdict
    assert judged.sentence.endswith(".") or verdict == "allow"


IDENTIFYING = [
    "Scan of Mr Otieno from yesterday", "Dr. Jane Wanjiru asked for it", "Patient name: Amina Hassan",
    "patient Peter Kamau, fever", "Doe^John^M", "seen on 12/03/2024", "seen 2024-03-12", "on 3rd March 2024",
    "March 12, 2024", "20240312", "DOB 4.5.71", "born in 1956", "call +254 712 345 678", "0712-345-678",
    "(020) 555 1234", "MRN 1234567", "patient id: A-4412", "NHS no 943 476 5919", "ID12345678",
    "jane@clinic.example", "lives at 14 Kenyatta Avenue", "P.O. Box 4412", "a 94 year old woman", "aged 101",
    "患者:张伟", "2023年5月6日", "jina la Juma Ali", "SSN 123-45-6789", "see www.example.org/p/77",
]  # fmt: skip
HARMLESS = [
    "Is there a fracture of the left rib?", "What is the size of the lesion in mm?",
    "A 3.5 x 4 cm mass in segment 7", "Is this an MRI or a CT?", "T2 weighted image", "Compare L4 and L5",
    "a 45 year old man with cough", "Which lung is bigger?", "BI-RADS 4", "Where is the nodule: left or right?",
    "2 weeks of fever, 38.5 degrees", "The right lung, upper lobe", "yes", "0",
    "What diseases are included in the picture?", "Does the patient have pneumonia?", "图中有肿瘤吗?",
    "Is the heart enlarged in the patient", "How many kidneys in this image?", "window 400/40",
    "Is it on the T1 sequence", "Is this patient male", "May this be a tumour?",
]  # fmt: skip


@pytest.mark.parametrize("text", IDENTIFYING)
def test_identifiers_are_found(text: str) -> None:
    found = deid.identifiers(text)
    assert found
    assert all(text[f.start : f.end].strip() for f in found)


@pytest.mark.parametrize("text", HARMLESS)
def test_clinical_questions_are_left_alone(text: str) -> None:
    assert deid.identifiers(text) == []


def test_findings_come_in_order() -> None:
    starts = [f.start for f in deid.identifiers("Mr Otieno, born 1956, call 0712 345 678")]
    assert starts == sorted(starts) and len(starts) >= 3
