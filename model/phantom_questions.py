"""What can be asked about a phantom, and its exact answer. See `phantoms` for the way in.

A topic is one thing asked, in several wordings. "closed" topics are answered Yes or No, each as often as the other.
`{lesion}` stands for the kind of lesion, so that no wording gives its own answer away. Sides are the patient's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ORGANS = {"chest": "Chest", "abdomen": "Abdomen", "brain": "Head", "hand": "Hand"}
MODALITIES = ("X-Ray", "CT", "MRI")

WORDINGS: dict[str, tuple[str, ...]] = {
    "modality": (
        "What modality is used to take this image?",
        "What is the modality of this image?",
        "How was this image taken?",
    ),
    "modality closed": ("Is this image taken by {modality}?", "Is this a {modality} image?"),
    "organ": (
        "Which part of the body does this image belong to?",
        "What part of the body is shown?",
        "Which body part was imaged?",
    ),
    "organ closed": ("Is this a study of the {organ}?", "Does this image show the {organ}?"),
    "healthy": ("Does this image look normal?", "Is this patient healthy?", "Is the image free of any abnormality?"),
    "presence": ("Is there a {lesion} in this image?", "Does the picture show a {lesion}?", "Can a {lesion} be seen?"),
    "lesion": ("What abnormality is seen?", "What disease is shown in this picture?", "What is the main finding?"),
    "side": (
        "Which side is the {lesion} on?",
        "On which side of the patient is the {lesion}?",
        "Where is the {lesion}, left or right?",
    ),
    "side closed": ("Is the {lesion} on the patient's {side} side?", "Is the {lesion} on the {side}?"),
    "clear": ("Which {half} looks normal?", "Which {half} is free of disease?"),
    "clear closed": ("Is the {side} {half} normal?", "Is the {side} {half} free of disease?"),
    "location": ("{where} is the {lesion}?", "Where is the {lesion} located, {zones}?"),
    "location closed": ("Is the {lesion} in the {zone}?", "Does the {lesion} lie in the {zone}?"),
    "size": (
        "How large is the {lesion}, small or large?",
        "Is the {lesion} small or large?",
        "What is the size of the {lesion}?",
    ),
    "count": ("How many {lesion}s are there?", "How many {lesion}s can be seen?"),
    "hand": ("Which hand is this?", "Is this a left or a right hand?", "Whose side is this hand, left or right?"),
    "hand closed": ("Is this a {side} hand?", "Is this the patient's {side} hand?"),
}
CLOSED = frozenset(topic for topic in WORDINGS if topic.endswith(" closed")) | {"healthy", "presence"}
SIDES = ("side", "side closed", "clear", "clear closed", "hand", "hand closed")  # all that a mirror changes
_HALVES = {"chest": "lung", "abdomen": "side of the abdomen", "brain": "side of the brain"}

# Names of the zones in questions and answers.
ZONES = {
    "upper": "upper part",
    "lower": "lower part",
    "front": "front",
    "back": "back",
    "liver": "liver",
    "spleen": "spleen",
    "kidney": "kidney",
    "fingers": "fingers",
    "wrist": "wrist",
}


@dataclass(frozen=True)
class Facts:
    """All that can be asked of one picture; lesion is empty in a healthy one. `kinds` and `zones` of this organ."""

    organ: str
    modality: str
    side: str
    lesion: str
    zone: str
    size: str
    count: int
    kinds: tuple[str, ...]
    countable: tuple[str, ...]
    zones: tuple[str, ...]


def topics(facts: Facts) -> list[str]:
    """The topics that have an answer in this picture."""
    names = ["modality", "modality closed", "organ", "organ closed", "healthy", "presence", "lesion"]
    if facts.organ == "hand":
        names += ["hand", "hand closed"]
    elif facts.lesion:
        names += ["side", "side closed", "clear", "clear closed"]
    if facts.lesion and len(facts.zones) > 1:
        names += ["location", "location closed"]
    if facts.lesion and facts.size:
        names.append("size")
    if facts.countable and (not facts.lesion or facts.lesion in facts.countable):
        names.append("count")
    return names


def interview(
    facts: Facts, wanted: int, weights: Mapping[str, float], rng: np.random.Generator
) -> list[tuple[str, str, str]]:
    """Up to `wanted` different questions, as (topic, question, answer); `weights` by topic (missing: 1).

    "side" in `weights` stands for every topic of `SIDES`, open and closed, and "location" for both of its own.
    """
    names = topics(facts)
    chance = np.array([_weight(name, facts, weights) for name in names])
    picks = rng.choice(len(names), size=4 * wanted, p=chance / chance.sum()).tolist()
    asked: dict[str, tuple[str, str, str]] = {}
    for pick in picks:
        if len(asked) < wanted:
            question, answer = ask(names[pick], facts, rng)
            asked.setdefault(question, (names[pick], question, answer))
    return list(asked.values())


def _weight(topic: str, facts: Facts, weights: Mapping[str, float]) -> float:
    family = "side" if topic in SIDES else topic.removesuffix(" closed")
    weight = weights.get(topic, weights.get(family, 1.0))
    if topic == "healthy":  # a healthy picture is rarer: ask more often there, or "No" would be the usual answer
        return weight * (1.0 if facts.lesion else 2.2)
    return weight * 2 if facts.organ == "hand" and family == "side" else weight


def ask(topic: str, facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    """One question of this topic in a random wording, and its answer."""
    wording = WORDINGS[topic][int(rng.integers(len(WORDINGS[topic])))]
    lesion = facts.lesion
    if topic == "presence" or (topic == "count" and not lesion):
        lesion = _kind_to_ask(topic, facts, rng)
    shown = {"modality": facts.modality, "organ": facts.organ, "side": facts.side, "zone": facts.zone}
    if topic == "healthy":
        answer = "No" if facts.lesion else "Yes"
    elif topic == "presence":
        answer = "Yes" if lesion == facts.lesion else "No"
    elif topic in CLOSED:
        answer = _propose(topic, facts, shown, rng)
    else:
        answer = _open(topic, facts)
    question = wording.format(
        lesion=lesion,
        modality=shown["modality"],
        side=shown["side"],
        zone=ZONES.get(shown["zone"], ""),
        organ="head" if shown["organ"] == "brain" else shown["organ"],
        zones=" or ".join(ZONES[z] for z in facts.zones),
        half=_HALVES.get(facts.organ, ""),
        where="In which organ" if facts.organ == "abdomen" else "Where",
    )
    return _article(question), answer


def _propose(topic: str, facts: Facts, shown: dict[str, str], rng: np.random.Generator) -> str:
    """Puts a true or, as often, a false value into `shown` and says which it was, Yes or No."""
    every: dict[str, tuple[str, ...]] = {"modality": MODALITIES, "organ": tuple(ORGANS), "location": facts.zones}
    family = topic.removesuffix(" closed")
    values = every.get(family, ("left", "right"))
    key = {"modality": "modality", "organ": "organ", "location": "zone"}.get(family, "side")
    true = _other(facts.side) if family == "clear" else shown[key]
    if rng.random() < 0.5:
        shown[key] = true
        return "Yes"
    others = [value for value in values if value != true]
    shown[key] = others[int(rng.integers(len(others)))]
    return "No"


def _other(side: str) -> str:
    return "right" if side == "left" else "left"


def _open(topic: str, facts: Facts) -> str:
    answers = {
        "modality": facts.modality,
        "organ": ORGANS[facts.organ],
        "lesion": facts.lesion.capitalize() or "None",
        "side": facts.side.capitalize(),
        "clear": _other(facts.side).capitalize(),
        "hand": facts.side.capitalize(),
        "size": facts.size.capitalize(),
        "location": ZONES.get(facts.zone, "").capitalize(),
        "count": str(facts.count),
    }
    return answers[topic]


def _kind_to_ask(topic: str, facts: Facts, rng: np.random.Generator) -> str:
    if topic == "count":
        return facts.countable[int(rng.integers(len(facts.countable)))]
    if facts.lesion and rng.random() < 0.6:
        return facts.lesion
    others = [kind for kind in facts.kinds if kind != facts.lesion]
    return others[int(rng.integers(len(others)))]


def _article(question: str) -> str:
    for wrong, right in (
        (" a abdomen", " an abdomen"),
        (" a X-Ray", " an X-Ray"),
        (" a MRI", " an MRI"),
        (" a effusion", " an effusion"),
        (" a infarct", " an infarct"),
        ("a pneumonia", "pneumonia"),
    ):
        question = question.replace(wrong, right)
    return question
