"""Reports, labels and questions that say what a phantom shows."""

from collections.abc import Sequence

import numpy as np

from data_prep.phantom_draw import Finding

LABELS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
LABEL_OF = {
    "cardiomegaly": "Cardiomegaly",
    "edema": "Edema",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "consolidation": "Consolidation",
    "atelectasis": "Atelectasis",
    "nodule": "Lung Lesion",
    "pacemaker": "Support Devices",
}
INDICATIONS = ("Shortness of breath.", "Chest pain.", "Cough and fever.", "Preoperative evaluation.", "Follow-up.")
SENTENCES = {
    "cardiomegaly": ("The heart is enlarged.", "There is cardiomegaly.", "The cardiac silhouette is enlarged."),
    "edema": ("There is {severity} pulmonary edema.", "Perihilar haze is consistent with {severity} pulmonary edema."),
    "pneumothorax": ("There is a {severity} {side} pneumothorax.", "{severity} pneumothorax on the {side}."),
    "effusion": ("There is a {severity} {side} pleural effusion.", "{severity} pleural effusion on the {side}."),
    "consolidation": (
        "There is consolidation in the {side} {zone} zone.",
        "Opacity in the {side} {zone} zone, consistent with consolidation.",
    ),
    "atelectasis": ("Linear atelectasis at the {side} base.", "There is plate-like {side} basal atelectasis."),
    "nodule": ("There is a {severity} nodule in the {side} {zone} zone.", "{side} {zone} zone nodule, {severity}."),
    "pacemaker": ("A {side}-sided pacemaker is in place.", "Pacemaker on the {side} with its lead over the heart."),
}
NEGATIONS = {
    "cardiomegaly": ("Heart size is normal.", "The cardiac silhouette is within normal limits."),
    "edema": ("There is no pulmonary edema.", "No edema."),
    "pneumothorax": ("No pneumothorax.", "There is no pneumothorax."),
    "effusion": ("No pleural effusion.", "There is no effusion."),
    "consolidation": ("The lungs are clear of consolidation.", "No focal consolidation."),
}
DOUBTS = ("Pneumonia cannot be excluded.", "Superimposed pneumonia is possible.")
NORMAL = "Heart size is normal. The lungs are clear. No pleural effusion or pneumothorax."


def severity(f: Finding) -> str:
    """From the drawn size."""
    small, large = {"edema": (0.07, 0.11), "nodule": (0.1, 0.15)}.get(f.name, (0.15, 0.27))
    return "small" if f.size < small else "large" if f.size > large else "moderate"


def write_report(
    findings: Sequence[Finding], view: str, sex: str, age: int, rng: np.random.Generator, follow_up: bool
) -> dict[str, str]:
    """Indication, findings and impression. Many normal studies get the same words, as in life."""
    who = {"F": "woman", "M": "man"}[sex]
    indication = f"{age}-year-old {who}. {INDICATIONS[rng.integers(len(INDICATIONS))]}"
    if not findings and rng.random() < 0.6:
        return {"indication": indication, "findings": NORMAL, "impression": "No acute cardiopulmonary abnormality."}
    pick = lambda options: str(options[rng.integers(len(options))])  # noqa: E731
    fill = lambda f: pick(SENTENCES[f.name]).format(severity=severity(f), side=f.side, zone=f.zone)  # noqa: E731
    positive = [fill(f) for f in findings]
    absent = [name for name in NEGATIONS if name not in {f.name for f in findings}]
    negative = [pick(NEGATIONS[name]) for name in absent if rng.random() < 0.7]
    text = [f"{view} view of the chest.", *positive, *negative]
    if follow_up:
        text.insert(1, "Compared with the prior study.")
    doubt = [pick(DOUBTS)] if any(f.name == "consolidation" for f in findings) and rng.random() < 0.6 else []
    capital = [s[0].upper() + s[1:] for s in [*text, *doubt]]
    impression = [s[0].upper() + s[1:] for s in positive[:3]] or ["No acute cardiopulmonary abnormality."]
    return {"indication": indication, "findings": " ".join(capital), "impression": " ".join(impression + doubt)}


def labels_of(findings: Sequence[Finding], report: dict[str, str]) -> dict[str, int | None]:
    """The 14 CheXpert labels that the report states: 1, 0, -1 (uncertain) or None (not mentioned)."""
    labels: dict[str, int | None] = dict.fromkeys(LABELS)
    for name, sentences in NEGATIONS.items():
        if any(s in report["findings"] for s in sentences):
            labels[LABEL_OF[name]] = 0
    if report["findings"] == NORMAL:
        labels |= {"Cardiomegaly": 0, "Pleural Effusion": 0, "Pneumothorax": 0, "Lung Opacity": 0}
    for f in findings:
        labels[LABEL_OF[f.name]] = 1
    if {"consolidation", "edema", "nodule", "atelectasis"} & {f.name for f in findings}:
        labels["Lung Opacity"] = 1
    if any(s in report["findings"] for s in DOUBTS):
        labels["Pneumonia"] = -1
    if all(labels[name] != 1 and labels[name] != -1 for name in LABELS[1:-1]):
        labels["No Finding"] = 1
    return labels


def _conversation(pairs: list[tuple[str, str, str, str]]) -> list[dict]:
    messages = []
    for n, (question, answer, answer_type, question_type) in enumerate(pairs):
        image = [{"type": "image"}] if n == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        text = [{"type": "text", "text": answer}]
        turn = {"role": "assistant", "content": text, "answer_type": answer_type, "question_type": question_type}
        messages.append(turn)
    return messages


def easy_messages(findings: Sequence[Finding], rng: np.random.Generator) -> list[dict]:
    """Eight short yes/no questions."""
    present = {f"{f.side} {f.name}" if f.side else f.name for f in findings} | {f.name for f in findings}
    asked = ["cardiomegaly", "pacemaker"]
    asked += [f"{side} {name}" for name in ("effusion", "pneumothorax", "consolidation") for side in ("left", "right")]
    pairs = [(f"{name} ?", "yes" if name in present else "no", "closed", "presence") for name in asked]
    rng.shuffle(pairs)  # type: ignore[arg-type]
    return _conversation(pairs)


def full_messages(
    findings: Sequence[Finding], view: str, report: dict[str, str], rng: np.random.Generator
) -> list[dict]:
    """Open and closed questions of several kinds, each answered by the picture."""
    nouns = {
        "cardiomegaly": "cardiomegaly",
        "effusion": "a pleural effusion",
        "pneumothorax": "a pneumothorax",
        "consolidation": "consolidation",
        "pacemaker": "a pacemaker",
        "edema": "pulmonary edema",
        "nodule": "a pulmonary nodule",
    }
    names = {f.name for f in findings}
    pairs = [("Which view is this?", view, "closed", "view")] if "AP" in view or rng.random() < 0.5 else []
    for name, noun in nouns.items():
        form = ("Is there {}?", "Does the image show {}?")[rng.integers(2)]
        pairs.append((form.format(noun), "yes" if name in names else "no", "closed", "presence"))
    by_name = {name: [f for f in findings if f.name == name] for name in names}
    for name, group in by_name.items():
        noun = nouns.get(name, name).removeprefix("a ")
        if group[0].side:
            sides = "both" if len({f.side for f in group}) == 2 else str(group[0].side)
            pairs.append((f"On which side is the {noun}?", sides, "closed", "side"))
        if name in ("effusion", "pneumothorax") and len(group) == 1:
            pairs.append((f"How large is the {noun}?", severity(group[0]), "closed", "severity"))
        if group[0].zone and name != "atelectasis":
            pairs.append((f"In which zone is the {noun}?", str(group[0].zone), "closed", "zone"))
    effusions = len(by_name.get("effusion", []))
    pairs.append(("How many sides have a pleural effusion?", str(effusions), "closed", "count"))
    listed = ", ".join(sorted(names)) or "none"
    pairs.append(("Which abnormal findings are present?", listed, "open", "finding"))
    pairs.append(("What is your impression?", report["impression"], "open", "impression"))
    rng.shuffle(pairs)  # type: ignore[arg-type]
    return _conversation(pairs[:8])
