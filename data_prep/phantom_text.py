"""Reports, labels and questions that say what a phantom shows.

A report is a list of statements, each a sentence with the CheXpert labels that it asserts, so labels cannot differ
from the words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.phantom_anatomy import Finding
from medvlm.data.labeler import LABELS

DEVICES = ("pacemaker", "endotracheal tube", "central line", "chest tube")
LABEL_OF = {
    "cardiomegaly": "Cardiomegaly",
    "edema": "Edema",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "consolidation": "Consolidation",
    "atelectasis": "Atelectasis",
    "nodule": "Lung Lesion",
    "mass": "Lung Lesion",
    "fracture": "Fracture",
    **dict.fromkeys(DEVICES, "Support Devices"),
}
OPACITIES = ("edema", "consolidation", "atelectasis", "nodule", "mass")
NOUNS = {
    "cardiomegaly": "cardiomegaly",
    "edema": "pulmonary edema",
    "pneumothorax": "a pneumothorax",
    "effusion": "a pleural effusion",
    "consolidation": "consolidation",
    "atelectasis": "atelectasis",
    "nodule": "a pulmonary nodule",
    "mass": "a lung mass",
    "fracture": "a rib fracture",
    "pacemaker": "a pacemaker",
    "endotracheal tube": "an endotracheal tube",
    "central line": "a central venous line",
    "chest tube": "a chest tube",
}
GRADES = {  # limits of size and the words below, between and above
    "cardiomegaly": (0.60, 0.65, "mild", "moderate", "severe"),
    "edema": (0.45, 0.65, "mild", "moderate", "severe"),
    "pneumothorax": (0.16, 0.26, "small", "moderate", "large"),
    "effusion": (0.18, 0.32, "small", "moderate", "large"),
}
INDICATIONS = (
    "Shortness of breath.",
    "Chest pain.",
    "Cough and fever.",
    "Preoperative evaluation.",
    "Fall, evaluate for injury.",
    "Hypoxia.",
    "Line placement.",
    "Weight loss.",
)
PRESENT = {
    "cardiomegaly": (
        "There is {grade} cardiomegaly.",
        "The heart is {grade}ly enlarged.",
        "{Grade} enlargement of the cardiac silhouette.",
    ),
    "edema": (
        "There is {grade} pulmonary edema.",
        "Bilateral perihilar haze and Kerley B lines, in keeping with {grade} pulmonary edema.",
        "{Grade} interstitial and alveolar edema.",
    ),
    "pneumothorax": (
        "There is a {grade} {side} pneumothorax.",
        "{Grade} pneumothorax on the {side}, with a visible pleural line.",
        "A {side} pleural line with lucency beyond it indicates a {grade} pneumothorax.",
    ),
    "effusion": (
        "There is a {grade} {side} pleural effusion.",
        "{Grade} {side} pleural effusion.",
        "Meniscus at the {side} costophrenic angle, consistent with a {grade} pleural effusion.",
    ),
    "consolidation": (
        "There is consolidation in the {lobe}.",
        "Airspace opacity with air bronchograms in the {lobe}, consistent with consolidation.",
        "Patchy consolidation, {lobe}.",
    ),
    "atelectasis": (
        "Linear atelectasis at the {side} base.",
        "Plate-like {side} basal atelectasis with elevation of the hemidiaphragm.",
        "{Side} basal bands of atelectasis with volume loss.",
    ),
    "nodule": ("There is a {mm} mm nodule in the {lobe}.", "A {mm} mm nodular opacity projects over the {lobe}."),
    "mass": ("There is a {cm} cm mass in the {lobe}.", "Spiculated mass of {cm} cm, {lobe}."),
    "fracture": ("There is a displaced {side} rib fracture.", "Displaced fracture of a {side} posterior rib."),
    "pacemaker": ("A {side}-sided pacemaker is in place.", "{Side} chest wall pacemaker with its lead over the heart."),
    "endotracheal tube": ("The endotracheal tube ends above the carina.", "Endotracheal tube in standard position."),
    "central line": ("A {side} central venous line ends in the superior vena cava.", "{Side} jugular central line."),
    "chest tube": ("A {side} chest tube is in place.", "{Side} chest tube with its tip at the apex."),
}
ABSENT = {
    "cardiomegaly": ("Heart size is normal.", "The cardiac silhouette is within normal limits.", "No cardiomegaly."),
    "edema": ("There is no pulmonary edema.", "No pulmonary edema."),
    "pneumothorax": ("No pneumothorax.", "There is no pneumothorax."),
    "effusion": ("No pleural effusion.", "There is no pleural effusion.", "The costophrenic angles are sharp."),
    "consolidation": ("No focal consolidation.", "The lungs are clear of consolidation."),
    "fracture": ("No displaced rib fracture.", "No acute fracture."),
}
MAYBE = {  # how a small finding may be hedged
    "edema": ("Possible mild interstitial edema.", "Perihilar haze may represent mild edema."),
    "effusion": (
        "Blunting of the {side} costophrenic angle may reflect a small effusion.",
        "Possible {side} effusion.",
    ),
}
PNEUMONIA = ("Pneumonia cannot be excluded.", "This may represent pneumonia.", "Superimposed pneumonia is possible.")
ANTERIOR = {"{side} ": "", "{Side} ": "", " on the {side}": "", "A {side}-sided": "A", "the {lobe}": "the {zone} chest"}
NORMALS = (  # most normal reports are word for word the same, as in life
    "The heart is normal in size. The lungs are clear. No pleural effusion or pneumothorax.",
    "Normal heart size. Clear lungs. No effusion or pneumothorax.",
)
CLEAR = ("No acute cardiopulmonary abnormality.", "No acute cardiopulmonary process.", "Normal chest.")


@dataclass
class Report:
    """``hedged`` names the findings that are drawn but reported as uncertain."""

    text: dict[str, str]
    labels: dict[str, int | None]
    hedged: set[str] = field(default_factory=set)


def grade(f: Finding) -> str | None:
    """The word for the drawn size, or None where the finding has no grades."""
    if f.name not in GRADES:
        return None
    low, high, *words = GRADES[f.name]
    return str(words[(f.size >= low) + (f.size >= high)])


def lobe(f: Finding) -> str | None:
    """The lobe that a zone of a frontal view is named after."""
    if f.zone is None or f.side is None:
        return None
    return "lingula" if (f.side, f.zone) == ("left", "middle") else f"{f.side} {f.zone} lobe"


def _fill(template: str, f: Finding) -> str:
    if f.side is None:
        for old, new in ANTERIOR.items():
            template = template.replace(old, new)
        template = template.replace("{lobe}", "{zone} chest")
    side, size = f.side or "", grade(f) or ""
    text = template.format(
        side=side,
        Side=side.capitalize(),
        grade=size,
        Grade=size.capitalize(),
        lobe=lobe(f),
        zone=f.zone,
        mm=round(f.size),
        cm=f"{f.size / 10:.1f}",
    )
    return text[0].upper() + text[1:]


def write_report(
    findings: Sequence[Finding],
    view: str,
    sex: str,
    age: int,
    rng: np.random.Generator,
    before: Sequence[Finding] | None = None,
) -> Report:
    """Indication, findings and impression; ``before`` are the findings of the prior study, if there is one."""

    def pick(options: Sequence[str]) -> str:
        return str(options[int(rng.integers(len(options)))])

    indication = f"{age}-year-old {'woman' if sex == 'F' else 'man'}. {pick(INDICATIONS)}"
    labels: dict[str, int | None] = dict.fromkeys(LABELS)
    if not findings and before is None and rng.random() < 0.75:
        labels |= {"No Finding": 1, "Cardiomegaly": 0, "Lung Opacity": 0, "Pleural Effusion": 0}
        normal = NORMALS[int(rng.random() < 0.3)]
        if view == "LATERAL":  # which does not show a pneumothorax
            normal = normal.replace(" or pneumothorax", "")
        else:
            labels["Pneumothorax"] = 0
        text = {"indication": indication, "findings": normal, "impression": CLEAR[0]}
        return Report(text, labels)
    name = view.lower() if view == "LATERAL" else view
    body = [pick((f"Single {name} view of the chest.", f"One {name} radiograph."))] if rng.random() < 0.6 else []
    if before is not None:
        body.append(pick(("Compared with the prior study.", "Comparison: prior radiograph.")))
    impression, hedged = [], set()
    order = [findings[int(i)] for i in rng.permutation(len(findings))]
    for f in order:
        if f.name in MAYBE and grade(f) in ("small", "mild") and rng.random() < 0.35:
            sentence, value = _fill(pick(MAYBE[f.name]), f), -1
            hedged.add(f.name)
        else:
            sentence, value = _fill(pick(PRESENT[f.name]), f), 1
        body.append(sentence + _change(f, before, rng))
        name = LABEL_OF[f.name]
        labels[name] = 1 if 1 in (value, labels[name]) else value
        if f.name in OPACITIES:
            labels["Lung Opacity"] = 1 if 1 in (value, labels["Lung Opacity"]) else value
        if f.name not in DEVICES or rng.random() < 0.3:
            impression.append(sentence)
    names = {f.name for f in findings}
    if "consolidation" in names and rng.random() < 0.6:
        impression.append(pick(PNEUMONIA))
    visible = [n for n in ABSENT if n not in names and not (view == "LATERAL" and n in ("pneumothorax", "fracture"))]
    for name in visible:
        if rng.random() < 0.7:
            body.append(pick(ABSENT[name]))
            labels[LABEL_OF[name]] = 0
    for f in before or ():
        if f.name not in names and rng.random() < 0.7:
            body.append(
                f"The previously seen {NOUNS[f.name].removeprefix('an ').removeprefix('a ')} is no longer seen."
            )
            if labels[LABEL_OF[f.name]] is None:
                labels[LABEL_OF[f.name]] = 0
    if not [f for f in findings if f.name not in DEVICES]:
        labels["No Finding"] = 1
        impression.insert(0, pick(CLEAR[:2] if findings else CLEAR))
    impression = impression[:5]
    if set(impression) & set(PNEUMONIA):  # it may have been the sixth
        labels["Pneumonia"] = -1
    text = {"indication": indication, "findings": " ".join(body), "impression": " ".join(impression)}
    return Report(text, labels, hedged)


def _change(f: Finding, before: Sequence[Finding] | None, rng: np.random.Generator) -> str:
    if before is None or rng.random() < 0.2:
        return ""
    old = next((b for b in before if b.seed == f.seed and b.name == f.name), None)
    if old is None:
        return " This is new."
    if f.name in DEVICES or f.name in ("fracture", "atelectasis") or abs(f.size / old.size - 1) < 0.06:
        return " Unchanged."
    return " This has increased." if f.size > old.size else " This has decreased."


Question = tuple[str, str, str, str]  # question, answer, answer type, question type


def _conversation(questions: Sequence[Question]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for n, (question, answer, answer_type, question_type) in enumerate(questions):
        image = [{"type": "image"}] if n == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        text = [{"type": "text", "text": answer}]
        turn = {"role": "assistant", "content": text, "answer_type": answer_type, "question_type": question_type}
        messages.append(turn)
    return messages


def easy_messages(findings: Sequence[Finding], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Eight short yes/no questions."""
    present = {f"{f.side} {f.name}" for f in findings} | {f.name for f in findings}
    asked = ["cardiomegaly", "pacemaker"]
    asked += [f"{side} {name}" for name in ("effusion", "pneumothorax", "consolidation") for side in ("left", "right")]
    asked = [asked[int(i)] for i in rng.permutation(len(asked))]
    return _conversation([(f"{a} ?", "yes" if a in present else "no", "closed", "presence") for a in asked])


def full_messages(
    findings: Sequence[Finding], view: str, hedged: set[str], askable: Sequence[str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Four to eight open and closed questions, each answered by the picture; hedged findings are not asked about."""
    names = {f.name for f in findings}
    clear = [f for f in findings if f.name not in hedged]

    def pick(*options: str) -> str:
        return str(options[int(rng.integers(len(options)))])

    pool: list[Question] = []
    yes = sorted(names & set(askable) - hedged)
    # As many absent findings are asked about as present ones, so that yes and no stay near balance.
    absent = [n for n in askable if n not in names]
    no = [absent[int(i)] for i in rng.permutation(len(absent))[: max(1, len(yes))]]
    for name in [*yes, *no]:
        question = pick("Is there {}?", "Does the image show {}?", "Is {} present?").format(NOUNS[name])
        pool.append((question, "yes" if name in names else "no", "closed", "presence"))
    pool.append(
        (
            pick("Which view is this?", "What is the projection?"),
            view.lower() if view == "LATERAL" else view,
            "closed",
            "view",
        )
    )
    for name in sorted({f.name for f in clear if f.side}):
        noun = NOUNS[name].removeprefix("an ").removeprefix("a ")
        sides = {f.side for f in clear if f.name == name}
        answer = "both" if len(sides) == 2 else str(min(map(str, sides)))
        pool.append(
            (pick("On which side is the {}?", "Which side is the {} on?").format(noun), answer, "closed", "side")
        )
    for f in clear:
        size, where = grade(f), f"{f.side} " if f.side else ""
        noun = where + NOUNS[f.name].removeprefix("an ").removeprefix("a ")
        if size is not None:
            question = "How large is the {}?" if "small" in GRADES[f.name] else "How severe is the {}?"
            pool.append((question.format(noun), size, "closed", "severity"))
        if f.zone and f.side and f.name != "atelectasis":
            pool.append((f"In which zone is the {noun}?", f.zone, "closed", "zone"))
    if view != "LATERAL" and "effusion" not in hedged:
        count = sum(f.name == "effusion" for f in findings)
        pool.append(("How many pleural effusions are there?", str(count), "closed", "count"))
    if view != "LATERAL":
        devices = len([f for f in findings if f.name in DEVICES])
        pool.append(("How many support devices are there?", str(devices), "closed", "count"))
    if not hedged:
        listed = ", ".join(_phrase(f) for f in findings) or "no abnormal finding"
        pool.append((pick("Which findings are present?", "What does the image show?"), listed, "open", "finding"))
    questions = [pool[int(i)] for i in rng.permutation(len(pool))[: int(rng.integers(4, 9))]]
    return _conversation(questions)


def _phrase(f: Finding) -> str:
    words = [f.side, f.name if f.name != "effusion" else "pleural effusion"]
    return " ".join(w for w in words if w) + (f" in the {f.zone} zone" if f.zone and f.name != "atelectasis" else "")
