"""What a converter yields: an :class:`Item` per sample to be, or a :class:`Dropped` row with its reason.

A converter only reads tables and text; ``data_prep.pipeline`` reads, decodes, shrinks and writes the images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medvlm.data.schema import Split

Kind = Literal["image", "dicom", "series", "nifti"]


@dataclass(frozen=True)
class Source:
    """One image file (or folder, for a DICOM ``series``) relative to the archive's root; an absolute path stays.

    ``options`` go to the decoder of its kind, which refuses others. image: ``keep_16_bit``, ``frame``. dicom:
    ``keep_16_bit``, ``frame``, ``windows`` [(centre, width), ...]. series: ``windows``, ``series_uid``. nifti:
    ``windows``, ``slope`` and ``intercept`` where the stored values need others, ``volume``, ``nan_value``, ``axes``,
    ``spacing``.
    """

    path: str
    kind: Kind = "image"
    image_id: str | None = None
    view: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A sample without its pixels.

    ``fields`` are those of :class:`medvlm.data.schema.Sample` except ``images``, ``source`` and ``license``;
    ``messages`` may be written as ``{"role": ..., "content": "<image> ..."}``.
    """

    fields: dict[str, Any]
    images: list[Source] = field(default_factory=list)


@dataclass(frozen=True)
class Dropped:
    """A row of the archive that cannot become a sample: which one (``what``), and why, in a few fixed words."""

    what: str
    reason: str
    split: Split | None = None


@dataclass(frozen=True)
class Converter:
    """One archive. ``items(source, **options)`` yields in a fixed order, and must hold no more than its tables.

    The options of ``items`` (keyword parameters with ``Annotated[..., typer.Option(help=...)]``) become options of
    ``medvlm prepare NAME``, beside those of the pipeline. ``mask`` says what happens to text that looks like protected
    health information: already de-identified public archives ``report`` it, one's own are masked.
    """

    name: str
    license: str
    help: str
    items: Callable[..., Iterator[Item | Dropped]]
    mask: Literal["off", "report", "mask"] = "report"
    deep_tables: tuple[str, ...] = ()
    """Patterns of its tables below the second level, by which a changed archive is noticed."""


def require(path: Path, hint: str) -> Path:
    """The path, or a UserError that says what should lie there."""
    from medvlm.errors import UserError

    if not path.exists():
        raise UserError(f"{path}: not found; {hint}")
    return path
