"""What can be asked about a phantom, and its exact answer. See `phantoms` for the way in.

A topic is one thing asked, in several wordings. "closed" topics are answered Yes or No, each as often as the other.
`{lesion}` stands for the kind of lesion, so that no wording gives its own answer away. Sides are the patient's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

ORGANS = {"chest": "Chest", "abdomen": "Abdomen", "brain": "Head", "hand": "Hand"}
MODALITIES = ("X-Ray", "CT", "MRI")

WORDINGS: dict[str, tuple[str, ...]] = {
    "modality": ("What modality is used to take this image?", "What is the modality of this image?",
                 "How was this image taken?"),
    "modality closed": ("Is this image taken by {modality}?", "Is this a {modality} image?"),
    "organ": ("Which part of the body does this image belong to?", "What part of the body is shown?",
              "Which body part was imaged?"),
    "organ closed": ("Is this a study of the {organ}?", "Does this image show the {organ}?"),
    "healthy": ("Does this image look normal?", "Is this patient healthy?", "Is the image free of any abnormality?"),
    "presence": ("Is there a {lesion} in this image?", "Does the picture show a {lesion}?", "Can a {lesion} be seen?"),
    "lesion": ("What abnormality is seen?", "What disease is shown in this picture?", "What is the main finding?"),
    "side": ("Which side is the {lesion} on?", "On which side of the patient is the {lesion}?",
             "Where is the {lesion}, left or right?"),
    "side closed": ("Is the {lesion} on the patient's {side} side?", "Is the {lesion} on the {side}?"),
    "location": ("{where} is the {lesion}?", "Where is the {lesion} located, {zones}?"),
    "location closed": ("Is the {lesion} in the {zone}?", "Does the {lesion} lie in the {zone}?"),
    "size": ("How large is the {lesion}, small or large?", "Is the {lesion} small or large?",
             "What is the size of the {lesion}?"),
    "count": ("How many {lesion}s are there?", "How many {lesion}s can be seen?"),
    "hand": ("Which hand is this?", "Is this a left or a right hand?", "Whose side is this hand, left or right?"),
    "hand closed": ("Is this a {side} hand?", "Is this the patient's {side} hand?"),
}
CLOSED = frozenset(topic for topic in WORDINGS if topic.endswith(" closed")) | {"healthy", "presence"}
WEIGHTS: dict[str, float] = {"side": 2.0, "side closed": 2.0, "hand": 2.0, "hand closed": 2.0, "lesion": 1.5}

# Names of the zones in questions and answers.
ZONES = {"upper": "upper part", "lower": "lower part", "front": "front", "back": "back", "liver": "liver",
         "spleen": "spleen", "kidney": "kidney", "fingers": "fingers", "wrist": "wrist"}


class Facts(NamedTuple):
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
        names += ["side", "side closed"]
    if facts.lesion and len(facts.zones) > 1:
        names += ["location", "location closed"]
    if facts.lesion and facts.size:
        names.append("size")
    if facts.countable and (not facts.lesion or facts.lesion in facts.countable):
        names.append("count")
    return names


def choose(facts: Facts, wanted: int, weights: Mapping[str, float], rng: np.random.Generator) -> list[str]:
    """`wanted` topics (or as many as there are), heavier ones sooner."""
    names = topics(facts)
    alias = {"hand": "side", "hand closed": "side closed"}
    chance = np.array([weights.get(n, weights.get(alias.get(n, n), WEIGHTS.get(n, 1.0))) for n in names])
    count = min(wanted, int((chance > 0).sum()))
    return [names[i] for i in rng.choice(len(names), size=count, replace=False, p=chance / chance.sum()).tolist()]


def ask(topic: str, facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    """One question of this topic in a random wording, and its answer."""
    wording = WORDINGS[topic][int(rng.integers(len(WORDINGS[topic])))]
    lesion = facts.lesion
    if topic == "presence" or (topic == "count" and not lesion):
        lesion = _kind_to_ask(topic, facts, rng)
    named = {"modality": (facts.modality, MODALITIES), "organ": (facts.organ, tuple(ORGANS)),
             "side": (facts.side, ("left", "right")), "zone": (facts.zone, facts.zones)}
    shown, answer = {key: value for key, (value, _) in named.items()}, "No"
    if topic in CLOSED and topic not in ("healthy", "presence"):
        key = next(k for k in named if "{" + k + "}" in wording)
        true, every = named[key]
        if rng.random() < 0.5:
            answer = "Yes"
        else:
            others = [v for v in every if v != true]
            shown[key] = others[int(rng.integers(len(others)))]
    elif topic == "healthy":
        answer = "No" if facts.lesion else "Yes"
    elif topic == "presence":
        answer = "Yes" if lesion == facts.lesion else "No"
    else:
        answer = _open(topic, facts)
    question = wording.format(
        lesion=lesion, modality=shown["modality"], side=shown["side"], zone=ZONES.get(shown["zone"], ""),
        organ="head" if shown["organ"] == "brain" else shown["organ"], zones=" or ".join(ZONES[z] for z in facts.zones),
        where="In which organ" if facts.organ == "abdomen" else "Where")
    return _article(question), answer


def _open(topic: str, facts: Facts) -> str:
    answers = {"modality": facts.modality, "organ": ORGANS[facts.organ], "lesion": facts.lesion.capitalize() or "None",
               "side": facts.side.capitalize(), "hand": facts.side.capitalize(), "size": facts.size.capitalize(),
               "location": ZONES.get(facts.zone, "").capitalize(), "count": str(facts.count)}
    return answers[topic]


def _kind_to_ask(topic: str, facts: Facts, rng: np.random.Generator) -> str:
    if topic == "count":
        return facts.countable[int(rng.integers(len(facts.countable)))]
    if facts.lesion and rng.random() < 0.6:
        return facts.lesion
    others = [kind for kind in facts.kinds if kind != facts.lesion]
    return others[int(rng.integers(len(others)))]


def _article(question: str) -> str:
    for wrong, right in ((" a abdomen", " an abdomen"), (" a X-Ray", " an X-Ray"), (" a MRI", " an MRI"),
                         (" a effusion", " an effusion"), (" a infarct", " an infarct"), ("a pneumonia", "pneumonia")):
        question = question.replace(wrong, right)
    return question
