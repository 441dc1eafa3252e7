"""Grep the original identifiers in the bytes of a de-identified file: a walk over its tags could miss what it misses.

Compared are bytes, not tags, so that a value in a place that no rule knows (file meta, preamble, an overlay, a private
block, the end of the file) is found too.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.deidentify_rules import KEPT_TEXT, KEPT_UIDS
from medvlm.data.phi import scan

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

BLANKS = " \0\r\n\t"
SHORTEST = 3
WHOLE_WORD_BELOW = 6  # shorter ones count only as a whole word: "Lee" is not in "SLEEP"
PIXELS_FROM = 6  # in pixel data a shorter one would turn up by chance
ENCODINGS = ("latin-1", "utf-8", "utf-16-le", "utf-16-be")
ELSEWHERE = ("iso2022_jp", "shift_jis", "euc_kr", "gb18030", "iso8859_2", "iso8859_5", "iso8859_7", "iso8859_9")
TEXT_VRS = frozenset(["AE", "LO", "LT", "SH", "ST", "UC", "UN", "UR", "UT"])
PERSONAL = re.compile("Patient|Person|Physician|Operator|Accession|Telephone|Phone|Address|Occupation|Ethnic|Religious")
WRITER = frozenset(["ImplementationClassUID", "ImplementationVersionName"])  # of the software, often pydicom too
NOBODY = frozenset(
    ["none", "unknown", "anonymous", "anonymized", "anon", "null", "other", "yes", "not", "male", "female"]
)


@dataclass(frozen=True)
class Identifier:
    """A value that must not be in the output; ``field`` is where it was (never print ``text``)."""

    field: str
    text: str
    kind: str = "text"  # "date", "uid" or "text"


def walk(dataset: "Dataset") -> Iterator["DataElement"]:
    """Every element at every depth, the file meta first."""
    levels = [dataset.file_meta, dataset] if hasattr(dataset, "file_meta") else [dataset]
    for level in levels:
        for element in level:
            if element.VR == "SQ":
                for item in element.value:
                    yield from walk(item)
            else:
                yield element


def strings(element: "DataElement") -> list[str]:
    """The values of an element as text; bytes (UN, private) as latin-1."""
    values = element.value if element.VM > 1 else [element.value]
    return [v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in values if v is not None]


def identifiers(dataset: "Dataset") -> list[Identifier]:
    """What the original holds about people, places, dates and numbers, and every text under a tag that is not kept.

    A name gives each of its parts, an address each word, a free text what looks like PHI in it. A text that is no
    person's and stands in a kept tag too (a description "CHEST" beside the body part) is not an identifier. A name
    that a kept code happens to hold is one: such a file is refused rather than guessed about.
    """
    from pydicom.uid import UID_dictionary

    found: dict[str, Identifier] = {}
    kept: set[str] = set()

    def add(field: str, text: str, kind: str = "text") -> None:
        text = text.strip(BLANKS)
        if len(text) >= SHORTEST and text.lower() not in NOBODY and re.search(r"\w", text):
            found.setdefault(text, Identifier(field, text, kind))

    impersonal: list[tuple[str, str]] = []
    for element in walk(dataset):
        if element.keyword in WRITER:
            continue
        field = element.keyword or ("private tag" if element.tag.is_private else f"tag {element.tag}")
        for value in strings(element):
            if element.VR == "PN":
                add(field, value)
                for part in re.split(r"[\^=\s,;.()-]+", value):
                    add(field, part)
            elif element.VR in ("DA", "DT"):
                digits = value.replace("-", "").replace(".", "")[:8]
                if len(digits) == 8:
                    add(field, digits, "date")
                    add(field, f"{digits[:4]}-{digits[4:6]}-{digits[6:]}", "date")
            elif element.VR == "UI":
                if value not in UID_dictionary and element.keyword not in KEPT_UIDS and len(value) >= 10:
                    add(field, value, "uid")
            elif element.VR in TEXT_VRS and element.keyword not in KEPT_TEXT:
                for finding in scan(value):
                    if finding.text not in UID_dictionary:
                        add(field, finding.text)
                if PERSONAL.search(field):
                    add(field, value)
                    for part in re.split(r"[\s,;]+", value) if "Address" in field else []:
                        add(field, part)
                else:
                    impersonal.append((field, value))
            elif element.VR in ("CS", "LO", "SH"):
                kept.add(value.strip().lower())
    known = "\n".join(kept)
    for field, value in impersonal:
        text = value.strip(BLANKS).lower()
        harmless = text in known or text in UID_dictionary or len(text) <= SHORTEST
        if not harmless and re.search("[a-z]|[0-9]{5}", text):
            add(field, value)
    return list(found.values())


def _boundaries(identifier: Identifier) -> tuple[str, str]:
    """What may not stand before and after, as look-around patterns: numbers are found as whole numbers only."""
    if identifier.kind == "date":
        return r"(?<![0-9])", ""  # a time may follow
    if identifier.text.isdigit():
        letters = "A-Za-z" if len(identifier.text) < 8 else ""
        return rf"(?<![0-9{letters}])", rf"(?![0-9{letters}])"
    if len(identifier.text) < WHOLE_WORD_BELOW:
        return r"(?<![0-9A-Za-z])", r"(?![0-9A-Za-z])"
    return "", ""


def _encoded(text: str) -> set[bytes]:
    forms = set()
    for encoding in ENCODINGS if text.isascii() else ENCODINGS + ELSEWHERE:
        try:
            forms.add(text.encode(encoding))
        except UnicodeEncodeError:
            continue
    return forms


def _text_runs(pixels: bytes) -> bytes:
    """The runs of six and more printable ASCII bytes, end to end: in 16-bit or compressed pixels there are few."""
    values = np.frombuffer(pixels, np.uint8)
    if len(values) < PIXELS_FROM:
        return b""
    printable = values - np.uint8(32) < 95  # wraps around below 32
    length = len(values) - PIXELS_FROM + 1
    starts = printable[:length].copy()
    for k in range(1, PIXELS_FROM):
        starts &= printable[k : k + length]
    inside = np.zeros(len(values), bool)
    for k in range(PIXELS_FROM):
        inside[k : k + length] |= starts
    return values[inside].tobytes()


def leaks(found: list[Identifier], data: bytes, pixels: bytes, cleaned: "Dataset") -> list[str]:
    """The fields whose original values are in the bytes ``data`` of the output, whatever their case or encoding.

    ``pixels`` is the value of PixelData as it stands in ``data``. It is no text: there only identifiers of six bytes
    and more are looked for, case-sensitively, because a few bytes turn up in megabytes of pixels by chance. A number
    that an IS or DS element of the output (a table position, say) holds as its value is not an identifier there.
    """
    start = data.find(pixels) if pixels else -1
    header = data if start < 0 else data[:start] + b"\0" + data[start + len(pixels) :]
    texts = [(element.VR, strings(element)) for element in walk(cleaned) if element.VR not in ("OB", "OW", "OV")]
    words = "\n".join(v for vr, values in texts if vr not in ("IS", "DS") for v in values)
    numbers = "\n".join(v for vr, values in texts if vr in ("IS", "DS") for v in values)
    lower, leaking = header.lower(), set()
    for identifier in found:
        before, after = _boundaries(identifier)
        in_numbers = 0
        if identifier.text.isdigit():
            in_numbers = len(re.findall(rf"{before}{identifier.text}{after}", numbers))
        # the byte after a value is the next tag's and may look like a letter: the parsed words are searched as well
        if re.search(f"{before}{re.escape(identifier.text)}{after}", words, re.IGNORECASE):
            leaking.add(identifier.field)
            continue
        for form in _encoded(identifier.text):
            if form.lower() not in lower:  # quick
                continue
            pattern = before.encode() + re.escape(form.lower()) + after.encode()
            if len(re.findall(pattern, lower)) > in_numbers:
                leaking.add(identifier.field)
    printed = _text_runs(pixels) if start >= 0 else b""
    for identifier in found if start >= 0 else []:
        form = identifier.text.encode()
        quick = not form.isascii() or form in printed
        if len(form) >= PIXELS_FROM and quick and form in pixels:
            leaking.add(f"{identifier.field} (in the pixel data)")
    return sorted(leaking)
