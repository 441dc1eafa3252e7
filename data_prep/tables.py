"""Tables of archives as rows: CSV and TSV (plain or gzip), JSON Lines and Parquet, with plain words for errors."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_prep.items import require
from medvlm.errors import UserError

BLANK = ("", "nan", "<na>", "null", "n/a")  # what other programs write where a value is missing
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
csv.field_size_limit(1 << 27)  # a report may exceed the default of 128 kB


def read_table(
    path: Path, columns: Sequence[str] = (), *, hint: str = "", encoding: str = "utf-8"
) -> Iterator[dict[str, Any]]:
    """The rows of a table, streamed, its format by suffix; text cells are stripped, and missing ones "".

    Cells of JSON Lines and Parquet keep lists and numbers. Raises UserError for a missing file or column, another
    encoding, and rows that do not fit their header.
    """
    require(path, hint or f"a table ({', '.join(SUFFIXES)}) is expected there")
    suffix = "".join(path.suffixes[-2:]).lower().removesuffix(".gz")
    suffix = suffix[suffix.rfind(".") :] if "." in suffix else suffix
    if suffix == ".parquet":
        rows = _parquet(path)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(path, encoding)
    elif suffix in (".csv", ".tsv", ".tab"):
        rows = _csv(path, "," if suffix == ".csv" else "\t", encoding)
    else:
        raise UserError(f"{path}: not a table by its suffix; use one of {', '.join(SUFFIXES)}")
    number = 0
    for number, row in enumerate(rows, 1):
        if number == 1:
            lacking = [name for name in columns if name not in row]
            if lacking:
                raise UserError(f"{path}: has no column {', '.join(lacking)}; it has {', '.join(map(str, row))[:300]}")
        yield {name: _cell(value) for name, value in row.items()}
    if not number:
        raise UserError(f"{path}: holds no row")


def column_names(path: Path, encoding: str = "utf-8") -> list[str]:
    """Of the first row. Raises UserError where the table has no row."""
    return list(next(read_table(path, encoding=encoding)))


def label(value: Any) -> int | None:
    """CheXpert's coding: 1 positive, 0 negative, -1 uncertain, None not mentioned (blank). Raises ValueError."""
    text = str(value).strip().lower()
    if value is None or text in BLANK:
        return None
    number = float(text)
    if number not in (-1, 0, 1):
        raise ValueError(f"{text} is not one of 1, 0, -1 and blank")
    return int(number)


def labels(row: dict[str, Any], names: Sequence[str]) -> dict[str, int | None]:
    """The labels of one row. Raises ValueError that names the column of a value out of range."""
    values = {}
    for name in names:
        try:
            values[name] = label(row.get(name))
        except ValueError:
            raise ValueError(f"{name} = {row.get(name)}") from None
    return values


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str):
        return "" if value.strip().lower() in BLANK else value.strip()
    return value


def _open(path: Path, encoding: str) -> TextIO:
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        if path.suffix.lower() == ".gz":
            return io.TextIOWrapper(gzip.open(path), encoding=name, newline="")
        return path.open(encoding=name, newline="")
    except LookupError:
        raise UserError(f"encoding: {encoding!r} is not known; utf-8, cp1252 and utf-16 are usual ones") from None


def _not_text(path: Path, encoding: str, error: Exception) -> UserError:
    mend = "name its encoding with --encoding (cp1252 and utf-16 are usual ones), or convert the file to UTF-8"
    return UserError(f"{path}: is not {encoding} text ({error}); {mend}")


def _csv(path: Path, delimiter: str, encoding: str) -> Iterator[dict[str, Any]]:
    with _open(path, encoding) as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) < len(header) or not header:
                raise UserError(f"{path}: its header is empty or names a column twice: {', '.join(header)[:300]}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    what = f"line {reader.line_num} has {len(cells)} cells and the header {len(header)}"
                    raise UserError(f"{path}: {what}; quote cells that hold the delimiter or a line break")
                yield dict(zip(header, cells, strict=True))
        except (UnicodeDecodeError, UnicodeError) as error:
            raise _not_text(path, encoding, error) from None
        except (csv.Error, gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: not a readable table ({error})") from None


def _json_lines(path: Path, encoding: str) -> Iterator[dict[str, Any]]:
    with _open(path, encoding) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}: line {number} is not a JSON object")
                yield row
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
        except (UnicodeDecodeError, UnicodeError) as error:
            raise _not_text(path, encoding, error) from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: not a readable table ({error})") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
