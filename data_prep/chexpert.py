"""CheXpert-v1.0 and -v1.0-small (Irvin et al. 2019): labels, no reports; so the conversation asks for the labels.

Contrastive training on images and labels needs no conversation, and keeps studies whose labels are all uncertain.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.splits import assign
from data_prep.tables import labels as read_labels
from data_prep.tables import read_table
from medvlm.data.schema import Split
from medvlm.errors import UserError

# Label -> how a question names it. "No Finding" is asked as "any abnormal finding": in train it is 1 or blank.
NOUNS = {
    "No Finding": "any abnormal finding",
    "Enlarged Cardiomediastinum": "an enlarged cardiomediastinum",
    "Cardiomegaly": "cardiomegaly",
    "Lung Opacity": "a lung opacity",
    "Lung Lesion": "a lung lesion",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "a pneumothorax",
    "Pleural Effusion": "a pleural effusion",
    "Pleural Other": "a pleural abnormality other than an effusion",
    "Fracture": "a fracture",
    "Support Devices": "a support device",
}
NORMAL, DEVICES = "No Finding", "Support Devices"
TEST_TABLES = ("test.csv", "test_labels.csv", "groundtruth.csv")
Uncertain = Literal["keep", "zeros", "ones", "ignore"]
_PATH = re.compile(
    r"(?:^|/)(?P<set>train|valid|test)/(?P<patient>patient\d+)/(?P<study>study\d+)(?:/(?P<file>[^/]+))?$"
)


@dataclass
class Study:
    """The rows of one study: ``labels`` as they stand in the table, or ``trouble``."""

    folder: str
    patient: str
    split: Split
    labels: dict[str, int | None]
    images: list[Source] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    trouble: tuple[str, str] | None = None  # what, reason


def items(
    source: Path,
    *,
    uncertain: Annotated[
        Uncertain, typer.Option(help="What -1 becomes in the labels: kept, 0, 1, or not mentioned.")
    ] = "keep",
    views: Annotated[
        Literal["all", "frontal", "lateral"], typer.Option(help="Which images of a study to take.")
    ] = "all",
    questions: Annotated[
        bool, typer.Option(help="Ask for the certain labels, or keep images and labels alone.")
    ] = True,
    test_labels: Annotated[Path | None, typer.Option(help="The test set's table, where it is elsewhere.")] = None,
    test_share: Annotated[int, typer.Option(help="Per cent of the patients of train that become the test split.")] = 0,
) -> Iterator[Item | Dropped]:
    """One sample per study: its images, its labels, and with ``questions`` a closed one per label that is certain.

    ``valid.csv`` is the validation split; the test set is taken where it lies beside it. Uncertain labels are not
    asked, whatever ``uncertain`` makes of them in ``labels``.
    """
    root = _root(source)
    if not 0 <= test_share < 100:
        raise UserError("test_share: give the per cent of train's patients, from 0 to 99")
    test = _test_table(root, test_labels)
    if test and test_share:
        raise UserError(f"test_share: {test} is a test set already; leave out one of the two")
    tables: list[tuple[Path, Split]] = [(root / "train.csv", "train"), (root / "valid.csv", "validation")]
    if test:
        tables.append((test, "test"))
    for path, split in tables:
        shares = (100 - test_share, 0, test_share) if split == "train" else None
        for study in _studies(path, root, source, split, shares):
            if isinstance(study, Dropped):
                yield study
            else:
                yield _item(study, uncertain, views, questions)


def _item(study: Study, uncertain: Uncertain, views: str, ask: bool) -> Item | Dropped:
    if study.trouble:
        return Dropped(*study.trouble, study.split)
    images = [i for i in study.images if views == "all" or (i.view == "LATERAL") == (views == "lateral")]
    if not images:
        return Dropped(study.folder, "no image of the chosen views", study.split)
    messages = questions_of(study.labels, len(images)) if ask else []
    value = {"keep": -1, "zeros": 0, "ones": 1, "ignore": None}[uncertain]
    labels = {name: value if v == -1 else v for name, v in study.labels.items()}
    if ask and not messages:
        return Dropped(study.folder, "no certain label", study.split)
    if all(v is None for v in labels.values()):
        return Dropped(study.folder, "no label", study.split)
    return Item(
        {
            "key": f"{study.patient}-{study.folder.rsplit('/', 1)[-1]}",
            "split": study.split,
            "patient_id": study.patient,
            "study_id": f"{study.patient}-{study.folder.rsplit('/', 1)[-1]}",
            "messages": messages,
            "labels": labels,
            "metadata": study.metadata,
        },
        images,
    )


def questions_of(labels: dict[str, int | None], n_images: int) -> list[dict[str, Any]]:
    """Yes/no questions for the labels that are certain; "any abnormal finding" wherever the others decide it."""
    abnormal = any(v == 1 for name, v in labels.items() if name not in (NORMAL, DEVICES))
    asked = {name: v for name, v in labels.items() if name != NORMAL and v in (0, 1)}
    if abnormal != (labels.get(NORMAL) == 1):  # else neither is said, or they contradict each other
        asked = {NORMAL: int(abnormal), **asked}
    messages: list[dict[str, Any]] = []
    for name, value in asked.items():
        user: list[dict[str, str]] = [{"type": "image"} for _ in range(0 if messages else n_images)]
        user.append({"type": "text", "text": f"Is there {NOUNS.get(name, name.lower())}?"})
        answer: dict[str, Any] = {"role": "assistant", "content": "yes" if value else "no"}
        messages += [{"role": "user", "content": user}, {**answer, "answer_type": "closed", "question_type": name}]
    return messages


def _root(source: Path) -> Path:
    """The folder with train.csv: SOURCE, or the only folder in it that has one."""
    if (source / "train.csv").is_file():
        return source
    below = sorted(source.glob("CheXpert*/train.csv"))
    if len(below) != 1:
        raise UserError(f"{source}: no train.csv; give the folder CheXpert-v1.0 or CheXpert-v1.0-small, or its parent")
    return below[0].parent


def _test_table(root: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given
    return next((root / name for name in TEST_TABLES if (root / name).is_file()), None)


def _studies(
    path: Path, root: Path, source: Path, split: Split, shares: tuple[int, int, int] | None
) -> Iterator[Study | Dropped]:
    """Studies of one table, each as soon as its last row is read, so that few are held.

    Tables name images (``Path``) or, for some test sets, studies (``Study``).
    """
    rows_left = Counter(found[0] for row in _rows(path) if (found := _place(row)))
    open_studies: dict[str, Study] = {}
    seen: set[str] = set()
    for row in _rows(path):
        found = _place(row)
        if found is None:
            yield Dropped(str(row.get("Path") or row.get("Study")), "not a CheXpert path", split)
            continue
        folder, patient, file = found
        if folder not in open_studies:
            open_studies[folder] = Study(folder, patient, assign(patient, shares=shares) if shares else split, {})
        if (image := f"{folder}/{file}") in seen:
            yield Dropped(image, "duplicate image", open_studies[folder].split)
        else:
            seen.add(image)
            _add(open_studies[folder], row, file, root, source)
        rows_left[folder] -= 1
        if not rows_left[folder]:
            yield open_studies.pop(folder)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_table(path, hint="CheXpert's table of images"):
        if "Path" not in row and "Study" not in row:
            raise UserError(f"{path}: has neither a column Path nor a column Study; it has {', '.join(row)[:300]}")
        if not NOUNS.keys() & row.keys():
            raise UserError(f"{path}: has no column of CheXpert's 14 labels; it has {', '.join(row)[:300]}")
        yield row


def _place(row: dict[str, Any]) -> tuple[str, str, str | None] | None:
    """(folder of the study, patient, file or None for all files of a study), or None for a path of another form."""
    found = _PATH.search(row["Path"] if "Path" in row else row["Study"])
    if found is None or ("Path" in row) != (found["file"] is not None):
        return None
    return f"{found['set']}/{found['patient']}/{found['study']}", found["patient"], found["file"]


def _add(study: Study, row: dict[str, Any], file: str | None, root: Path, source: Path) -> None:
    names = [name for name in NOUNS if name in row]
    try:
        labels = read_labels(row, names)
    except ValueError as error:
        study.trouble = (f"{study.folder} ({error})", "label out of range")
        return
    if study.images and labels != study.labels:
        study.trouble = (study.folder, "labels differ between the images of a study")
    study.labels = labels
    sex = {"Female": "F", "Male": "M"}.get(row.get("Sex", ""))  # one row of train says Unknown
    age = str(row.get("Age", ""))
    if sex:
        study.metadata["sex"] = sex
    if age.isdigit() and int(age):  # three rows of train say 0
        study.metadata["age"] = min(90, int(age))
    files = [file] if file else sorted(p.name for p in (root / study.folder).glob("view*.*"))
    if not files:
        study.trouble = (study.folder, "no image")
    for name in files:
        lateral = row.get("Frontal/Lateral") == "Lateral" or "lateral" in name
        view = "LATERAL" if lateral else row.get("AP/PA") or "FRONTAL"
        place = root / study.folder / name
        relative = place.relative_to(source).as_posix()
        study.images.append(Source(relative, image_id=f"{study.folder}/{name}", view=view))


CONVERTER = Converter(
    name="chexpert",
    license="Stanford University Dataset Research Use Agreement",
    help="CheXpert: images and labels, asked as yes/no questions.",
    items=items,
)
