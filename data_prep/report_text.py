"""Radiology reports: split into sections, tidied, and turned into a conversation.

The header pattern, the names of sections and the rules of :func:`parse_report` follow what is documented of MIMIC-CXR's
section parser (MIT-LCP/mimic-cxr, txt/section_parser.py) and of its reports (addenda between lines of underscores).
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from medvlm.data.phi import drop_masked_sentences
from medvlm.data.schema import DEIDENTIFICATION_MASK

CORE = ("findings", "impression")
# What surrounds a report is known before the image is read: never a target.
CONTEXT = ("indication", "history", "comparison", "technique", "examination", "addendum", "preamble")
# Text may stand right behind the colon of a name that is known.
_HEADER = re.compile(
    r"^[ \t]*(?:(?P<name>[A-Z][A-Z ()/,&-]*):(?=\s|$)"
    r"|(?P<close>FINDINGS|IMPRESSION|CONCLUSION|INDICATION|HISTORY|COMPARISON|TECHNIQUE):)",
    re.MULTILINE,
)
_RULE = re.compile(r"^[ \t]*_{20,}[ \t]*$", re.MULTILINE)  # "___" alone in a line is a de-identified gap
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_LIST_ENTRY = re.compile(r"(?<=[.:!?])[ \t]*\n(?=[ \t]*\d{1,2}[.)][ \t])")
_NAMES = {
    "impression": ("conclusion",),
    "findings": ("finding",),
    "indication": ("reason for exam", "reason for examination", "reason for study", "clinical indication"),
    "history": ("clinical information", "pfi"),
    "comparison": ("reference exam",),
    "examination": ("exam", "type of exam", "type of examination"),
    "recommendations": ("recommendation", "recommendation(s)"),
    "wet read": ("wetread",),
    "technique": (),
    "addendum": (),
    "notification": (),
    "comment": (),
    "date": (),
}
_SECTION_OF = {name: section for section, names in _NAMES.items() for name in (section, *names)}
# In this order: "findings and impression" is an impression.
_WITHIN = ("impression", "findings", "history", "comparison", "addendum", "indication")
# Of misspelt headers ("IMPRESSON", "COMPARRISON") the nearest of these; NDICATION is an indication, not an impression.
_SPELLED = ("impression", "findings", "indication", "comparison", "comparisons")
_VIEWS = re.compile(
    r"chest|portable|\b(?:pa|ap|frontal) (?:and )?(?:lat|view|upright|semi-upright)|lateral and|frontal and"
    r"|lateral view|(?:one|two) views?|bone window|ribs"
)


def section_name(header: str) -> str:
    """The section that a header opens, in lower case: ``CONCLUSION`` and ``IMPRESSON`` are impression, a header that
    names the examination (``CHEST, PA & LATERAL``) is findings; other headers keep their own name."""
    name = " ".join(header.lower().replace("&", " and ").split())
    if name in _SECTION_OF:
        return _SECTION_OF[name]
    if name.startswith(("reason for", "technique")):  # whatever of: "reason for chest x-ray" is no examination
        return "technique" if name.startswith("technique") else "indication"
    near = difflib.get_close_matches(name, _SPELLED, n=1, cutoff=0.87)
    if near:
        return near[0].rstrip("s") if near[0] == "comparisons" else near[0]
    for section in _WITHIN:
        if section in name:
            return section
    return "findings" if _VIEWS.search(name) else name


def split_sections(text: str) -> list[tuple[str, str]]:
    """(section, raw text) in the order of the report; what stands before the first header is ``preamble``.

    A report without any header is one ``preamble``. Addenda, divided from the report by lines of underscores, are
    ``addendum`` whatever headers they hold; the report is the last part with findings or impression, or else with any
    header.
    """
    parts = [part for part in _RULE.split(text.replace("\r\n", "\n")) if part.strip()]
    read = [_headed(part) for part in parts]
    headed = [i for i, sections in enumerate(read) if len(sections) > 1]
    whole = [i for i in headed if read[i][1][0] != "addendum" and any(name in CORE for name, _ in read[i])]
    main = (whole or headed or [len(parts) - 1])[-1]
    found: list[tuple[str, str]] = []
    for i, part in enumerate(parts):
        if i == main:
            found += read[i]
        else:  # below the report a signature, or a second rule
            found.append(("addendum" if i < main or i in headed else "preamble", part))
    return found


def _headed(text: str) -> list[tuple[str, str]]:
    """The preamble, and each header's section with its text."""
    headers = list(_HEADER.finditer(text))
    starts = [h.start() for h in headers] + [len(text)]
    names = [section_name(h["name"] or h["close"]) for h in headers]
    texts = [text[h.end() : end] for h, end in zip(headers, starts[1:], strict=True)]
    return [("preamble", text[: starts[0]]), *zip(names, texts, strict=True)]


def parse_report(text: str) -> dict[str, str]:
    """Section -> its raw text. Of a section that occurs several times the last one that is not empty counts.

    Where there is neither findings nor impression, ``last_paragraph`` is what follows the first paragraph of the last
    section: many short reports have one header and then plain text.
    """
    sections: dict[str, str] = {}
    found = split_sections(text)
    for name, body in found:
        if name == "addendum" and name in sections and body.strip():
            sections[name] += "\n\n" + body
        elif body.strip():
            sections[name] = body
    if not any(name in sections for name in CORE) and sections:
        name, body = next((name, body) for name, body in reversed(found) if body.strip())
        first, *rest = [p for p in _BLANK_LINE.split(body.strip("\n")) if p.strip()]
        if rest:  # the section keeps its first paragraph alone: what is to be written must not be told before
            sections |= {name: first, "last_paragraph": "\n\n".join(rest)}
    return sections


def tidy(text: str, mask: str | None = DEIDENTIFICATION_MASK) -> str:
    """Wrapped lines joined, one line per paragraph or list entry, without the sentences that hold ``mask``."""
    kept = text if mask is None else drop_masked_sentences(text, mask)
    paragraphs = (p for block in _BLANK_LINE.split(kept) for p in _LIST_ENTRY.split(block))
    lines = (" ".join(p.split()) for p in paragraphs)
    # A list number whose sentence went, or a lone mark, is no text.
    return "\n".join(line for line in lines if re.search(r"[^\W\d_]", line))


def choose_sections(
    sections: dict[str, str], wanted: Iterable[str], mask: str | None = DEIDENTIFICATION_MASK
) -> dict[str, str]:
    """The wanted sections as targets, tidied; those with nothing left are absent."""
    chosen = {name: tidy(sections.get(name, ""), mask) for name in wanted}
    return {name: text for name, text in chosen.items() if text}


def indication_of(sections: dict[str, str], mask: str = DEIDENTIFICATION_MASK) -> str | None:
    """The indication, else the history, for the question; masked gaps stay, written as ``___``."""
    text = sections.get("indication") or sections.get("history") or ""
    return tidy(text.replace(mask, DEIDENTIFICATION_MASK), mask=None) or None


def report_messages(report: dict[str, str], n_images: int, indication: str | None = None) -> list[dict[str, Any]]:
    """A request with all images, and the report as the answer; [] without images or where no sentence is left.

    ``report`` maps sections to their text; those of ``CONTEXT`` are no target. The indication (given, or that of the
    report) stands in the request. Sentences that hold ``___`` never become targets.
    """
    target = choose_sections(report, [name for name in report if name not in CONTEXT])
    if not target or not n_images:
        return []
    names = list(target)
    asked = "report" if names[0] not in CORE else " and ".join(names) + " of the report"
    request = f"Write the {asked}."
    context = indication if indication is not None else report.get("indication")
    if context and context.strip():
        request = f"Indication: {' '.join(context.split())}\n{request}"
    user: list[dict[str, str]] = [{"type": "image"} for _ in range(n_images)]
    user.append({"type": "text", "text": request})
    if len(names) == 1:
        answer = target[names[0]]
    else:
        answer = "\n".join(f"{name.replace('_', ' ').capitalize()}: {text}" for name, text in target.items())
    return [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def section_list(value: str, allowed: Sequence[str] = CORE) -> list[str]:
    """``"findings,impression"`` -> its names. Raises UserError for another name or none."""
    from medvlm.errors import UserError

    names = [name.strip() for name in value.split(",") if name.strip()]
    wrong = [name for name in names if name not in allowed]
    if wrong or not names:
        raise UserError(f"sections: {', '.join(wrong) or 'none given'}; take one or more of {', '.join(allowed)}")
    return list(dict.fromkeys(names))
