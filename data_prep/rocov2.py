"""ROCOv2 (Rückert et al., Scientific Data 2024, doi:10.1038/s41597-024-03496-6) -> images with captions.

The release is ``{train,valid,test}_captions.csv`` (ID, Caption), ``{train,valid,test}_concepts.csv`` (ID, CUIs with
``;`` between them) and the images ``ID.jpg`` in ``train/`` or ``train_images/`` and so on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import Encoding, caption_messages, fault, inside, make_key, tidy
from data_prep.tables import read_table
from medvlm.data.schema import Split
from medvlm.errors import UserError

HINT = "give the folder of the ROCOv2 release, with train_captions.csv and the images in train/"
NAMES: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}


def items(
    source: Path,
    manual: Annotated[bool, typer.Option(help="Take concepts from *_concepts_manual.csv.")] = False,
    encoding: Encoding = "utf-8",
) -> Iterator[Item | Dropped]:
    """One sample per image in its official split. Concepts (UMLS CUIs) go to the metadata, for they are not labels."""
    seen: set[str] = set()
    for split, name in NAMES.items():
        table = source / f"{name}_captions.csv"
        folders = [f for f in (name, f"{name}_images", f"{name}/images", f"{name}/{name}") if (source / f).is_dir()]
        if not folders and table.exists():
            raise UserError(f"{source / name}: not found; unpack {name}_images.zip into {name}/ or {name}_images/")
        concepts = _concepts(source / f"{name}_concepts{'_manual' * manual}.csv", manual, encoding)
        for number, row in enumerate(read_table(table, ("ID", "Caption"), hint=HINT, encoding=encoding), 1):
            image_id, caption = row["ID"], tidy(row["Caption"])
            what = f"{table.name} row {number}: {image_id}"
            path = next((p for f in folders if inside(source, p := f"{f}/{image_id}.jpg")), None)
            why = "duplicate id" if image_id in seen else fault("Describe", caption)
            seen.add(image_id)
            if why or path is None:
                yield Dropped(what, why or "missing image", split)
                continue
            key = make_key(image_id)
            yield Item(
                {
                    "key": key,
                    "split": split,
                    "messages": caption_messages(key, caption),
                    "metadata": {"concepts": concepts.get(image_id, [])},
                },
                [Source(path, image_id=image_id)],
            )


def _concepts(table: Path, required: bool, encoding: str) -> dict[str, list[str]]:
    if not table.exists() and not required:
        return {}
    rows = read_table(table, ("ID", "CUIs"), hint=HINT, encoding=encoding)
    return {row["ID"]: [c.strip() for c in row["CUIs"].split(";") if c.strip()] for row in rows}


CONVERTER = Converter(
    name="rocov2",
    license="CC BY or CC BY-NC, by article",
    help="ROCOv2: radiological images of articles with captions and UMLS concepts.",
    items=items,
)
