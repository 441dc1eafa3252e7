"""PMC-OA (Lin et al., PMC-CLIP, arXiv 2303.07240) -> samples of a figure and its caption.

Either ``pmc_oa.jsonl`` (objects with ``image`` and ``caption``) or the CSV of PMC-CLIP (columns image, caption), and
the figures in ``images/`` or beside the table. Neither names a split: whole articles are assigned by a hash.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import Encoding, article_of, caption_messages, fault, inside, make_key, refuse_pointer, tidy
from data_prep.splits import assign
from data_prep.tables import read_table
from medvlm.errors import UserError

HINT = "give the folder with pmc_oa.jsonl, or name the table with --table"
FOLDERS = ("images", "caption_T060_filtered_top4_sep_v0_subfigures", ".")


def items(
    source: Path,
    table: Annotated[str, typer.Option(help="The JSONL or CSV below the folder.")] = "pmc_oa.jsonl",
    images: Annotated[str | None, typer.Option(help="The folder of figures; by default images/.")] = None,
    encoding: Encoding = "utf-8",
) -> Iterator[Item | Dropped]:
    """One sample per figure; 80/10/10 by the article's PMC id where the file name holds one, else by the figure."""
    folders = [images] if images else [f for f in FOLDERS if (source / f).is_dir()]
    if images and not (source / images).is_dir():
        raise UserError(f"{source / images}: not found; give --images as a folder below {source}")
    seen: set[bytes] = set()
    refuse_pointer(source / table)
    rows = read_table(source / table, ("image", "caption"), hint=HINT, encoding=encoding)
    for number, row in enumerate(rows, 1):
        name, caption = tidy(row.get("image")), tidy(row.get("caption"))
        what = f"{table} row {number}: {name}"
        if not name:
            yield Dropped(what, "row without image or caption")
            continue
        article = article_of(name)
        split = assign(article or name)
        key = make_key(name.rpartition(".")[0] or name)
        path = next((p for f in folders if inside(source, p := str(Path(f) / name))), None)
        why = "duplicate image" if key.encode() in seen else fault("Describe", caption)
        seen.add(key.encode())
        if why or path is None:
            yield Dropped(what, why or "missing image", split)
            continue
        fields = {"key": key, "split": split, "study_id": article, "messages": caption_messages(key, caption)}
        yield Item(fields, [Source(path, image_id=name)])


CONVERTER = Converter(
    name="pmc-oa",
    license="unknown (varies by article)",
    help="PMC-OA: figures of PubMed Central articles with captions.",
    items=items,
)
