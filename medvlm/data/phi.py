"""Text that looks like protected health information: find it, mask it, and drop sentences that were masked before.

Patterns of the HIPAA Safe Harbor list (45 CFR 164.514(b)(2)) that have a form: a name beside a title, a label or a
degree, dates, ages over 89, numbers of records and accounts, phones, e-mail, URLs, street addresses, UIDs. A name
without such a context, a rare place or an unusual format passes unseen: this is a check beside the data owner's own
de-identification, and never a proof that a text is free of PHI. Years alone and times of day are left as they are.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """``text[start:end]`` looks like PHI of this kind: name, date, age, id, uid, phone, email, url or address."""

    kind: str
    start: int
    end: int
    text: str


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Eponyms and makers, as in "Swan Ganz" or "Kerley B". Without a title, a label or another word they are no names.
EPONYMS = _words(
    """
    abbott addison alzheimer amplatzer baastrup baker bankart barrett behcet bennett bertolotti billroth biotronik
    bivona blake blakemore blount bochdalek boehler boerhaave bohler bosniak boston bovie broviac burkitt calve cath
    charcot chiari chilaiditi churg cobb codman colles conn crohn cushing dandy danlos debakey dobbhoff dobhoff
    douglas down dressler dubhoff ebstein edwards ehlers eisenmenger ewing fabry fallot fazekas fisher fleischner
    foley fontaine forestier freiberg galeazzi galen ganz gaucher ghon glasgow gleason golden goodpasture graf
    graves groshong hampton harrington harris hartmann hashimoto heister heller hess hickman hill hirschsprung
    hodgkin hoffa hounsfield hunt huntington impella jackson jones kaposi kawasaki kerley kienbock kirschner
    klinefelter kohler koos ladd langerhans legg lisfranc luftsichel luschka magendie maisonneuve mallory marfan
    martin meckel mediport medtronic minnesota monckeberg monro monteggia morgagni morison nissen oddi osgood paget
    pancoast parkinson penrose perthes poland port pott pratt prinzmetal quinton ranke rathke raynaud riedel rigler
    risser rolando roux rutherford sachs salem salter santorini sapien schatzki scheuermann schlatter schmorl
    scientific segond seldinger sengstaken sever shiley sjogren smith spalding spetzler stanford stensen strauss
    sump swan sylvian takayasu tanner tenckhoff thornwaldt tietze tornwaldt turner udall vater virchow walker
    warthin watchman weber wegener weiss westermark wharton whipple white willis wilson winter winters wirsung wolff
    zenker
    """
)
# Words that are capitalised in reports and follow a label without being anybody's name.
COMMON = _words(
    """
    a abdomen above addendum after an and angle aorta ap are as at attending before below bone bones boy brain by
    called cardiology care catheter center chest child clinic clinical comparison conclusion critical ct cxr date
    department dept discussed disease do doctor dr during emergency erect et exam examination fellow female final
    finding findings floor for fracture from frontal girl grade had has have he head heart her hilar hilum his
    history hospital house housestaff hump icu image images immediately impression in indication infant information
    intern internal interpretation interval intubated is it iv kidney lateral left line lines liver lobe lower lung
    lungs male man md mediastinum medical medicine micu middle mr mri mrs ms name neck neurology ng nm no none
    normal not notified np nurse nursing obese of og on oncology or ordering orthopedics other pa pac paged patient
    patients pediatrics pelvis per pet phd phone physician picc pleura portable positioned post preliminary primary
    procedure prone provider pt pulmonary radiologist radiology reason recommendation referring report resident rib
    ribs right rn rotated same score see semi semierect service she sicu sign signed sitting soft spine spleen
    stable staff status study supine surgeon surgery syndrome team tech technique technologist telephone that the
    their there these they this time tissue tissues to trachea trauma tube unchanged unit unknown upper upright us
    via view views was were with woman xr
    """
)
# After a lower-case title only a word that is not one of these counts: "dr. smith", but not "the dr. was notified".
_AFTER_TITLE = _words(
    """was were are has had have will who whom and the this that for with from about via when then notified informed
    med habil called paged aware present xxxx office team clinic"""
)

_WORD = r"(?!X{2,}|_)[A-ZÀ-ÖØ-Þ](?:[a-zà-öø-ÿ]+|[A-ZÀ-ÖØ-Þ]+)?(?:['’-][A-ZÀ-ÖØ-Þa-zà-öø-ÿ]+)*(?:[A-Z][a-z]+)?"
_INITIAL = r"[A-Z]\.?(?!\.?D\b)"
_PARTICLE = r"(?:van|von|der|den|de|la|le|di|da|del|dos|bin|al|el|St\.?)"
_WRAPPED = r"[ \t]*\n[ \t]*[A-ZÀ-ÖØ-Þ][a-zà-öø-ÿ]+\b(?![ \t]*:)"  # a name may go on in the next line, a heading not
_MORE = rf"(?:[ \t]+(?:{_INITIAL}(?![A-Za-z])|{_PARTICLE}\b|{_WORD})){{0,4}}"
_FULL = rf"(?:[A-Z]\.[ ]?){{0,3}}(?:{_WORD}{_WRAPPED}|{_WORD}{_MORE})"
_TWO = rf"(?:{_WORD}|{_INITIAL})(?:[ \t]+(?:{_INITIAL}(?![A-Za-z])|{_PARTICLE}))*[ \t]+{_WORD}"
_COMMA = rf"{_WORD}(?:[ -]{_WORD})?,[ \t]*{_WORD}(?:[ \t]+{_INITIAL}(?![A-Za-z]))?"
_DEGREE = r"(?:M\.?D\.?|Ph\.?D\.?|D\.O\.|R\.?N\.?|PA-C|FRCR|FACR|MBBS)(?![A-Za-z])"
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?|JAN(?:UARY)?|FEB(?:RUARY)?|MAR(?:CH)?|APR(?:IL)?|MAY|JUNE?|JULY?|AUG(?:UST)?"
    r"|SEPT?(?:EMBER)?|OCT(?:OBER)?|NOV(?:EMBER)?|DEC(?:EMBER)?"
    r"|january|february|april|june|july|august|september|october|november|december|jan|feb|apr|aug|sept?|oct|nov|dec)"
)
_D, _M, _Y = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK"
    "|OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY|PR"
)
_STREET = (
    r"(?:Street|STREET|St|ST|Avenue|AVENUE|Ave|AVE|Road|ROAD|Rd|RD|Boulevard|BOULEVARD|Blvd|BLVD|Lane|LANE|Ln|Drive"
    r"|DRIVE|Court|COURT|Parkway|PARKWAY|Pkwy|Highway|HIGHWAY|Hwy|Terrace|TERRACE|Square|SQUARE)"
)
_BY = r"dictated|signed|electronically[ ]signed|read|reviewed|interpreted|transcribed|approved|verified|authenticated"
_TITLE = r"(?:Drs?|Doctor|Mr|Mrs|Ms|Miss|Prof|Professor)"  # several may stand together
_OF_DEGREE = r"(?:(?:med|dent|habil|rer|nat|univ|h\.?[ ]?c)\b\.?[ \t]*)*"
_VALUE = r"(?=[\w-]*\d[\w-]*\d[\w-]*\d)[A-Za-z]{0,5}-?\d[\w-]*"


def _words_beside(text: str, known: frozenset[str]) -> bool:
    words = [w for w in re.findall(r"[^\W\d_]+", text) if len(w) > 1 and not re.fullmatch("X+", w)]
    return any(w.lower() not in known for w in words)


def _is_person(text: str) -> bool:
    """After a label: not only roles, anatomy and single letters."""
    return _words_beside(text, COMMON)


def _is_name(text: str) -> bool:
    """Without a label: not only those and eponyms."""
    return _words_beside(text, COMMON | EPONYMS)


def _not_verb(text: str) -> bool:
    return text not in _AFTER_TITLE


def _enough_digits(text: str) -> bool:
    return 4 <= sum(c.isdigit() for c in text) <= 15


# (kind, pattern, check): group "v" is what is masked, else the whole match. Earlier patterns win where they overlap.
_RULES: list[tuple[str, re.Pattern[str], Callable[[str], bool] | None]] = [
    (kind, re.compile(pattern), check)
    for kind, pattern, check in [
        ("url", r"(?i:\bhttps?://|\bwww\.)[^\s<>\"]*[^\s<>\".,;:!?)\]]", None),
        ("email", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", None),
        ("uid", r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){5,}(?![\w.]*\w)", lambda t: len(t) >= 14),
        # names
        ("name", rf"\b(?:Drs|DRS)\.?[ ](?P<v>{_WORD}(?:,?[ ](?:and[ ]|&[ ])?{_WORD})+)", None),
        ("name", rf"\b(?:{_TITLE}\b\.?[ \t]*{_OF_DEGREE})+\n?[ \t]*(?!{_TITLE}\b)(?P<v>{_FULL})", None),
        (
            "name",
            r"\bDRS?[ ](?P<v>[A-Z][A-Z'-]+(?:[ ][A-Z][A-Z'-]+)??)(?=[ ](?:NOTIFIED|INFORMED|PAGED|CALLED|WAS|AT)\b)",
            _is_person,
        ),
        # without its dot "MR" is a scanner and "MS" a disease
        ("name", rf"\b(?:DRS?|MR|MRS|MS|PROF)\.[ \t]*\n?[ \t]*(?P<v>{_FULL})", _is_person),
        ("name", r"\b(?:[Dd]r|[Mm]rs?|[Mm]s)\.[ \t]*(?P<v>[a-zà-ÿ]{3,})\b", _not_verb),
        ("name", r"\b[A-Z][A-Za-z'-]+\^[A-Za-z][A-Za-z'^-]*", None),
        (
            "name",
            rf"\b(?i:{_BY}|reported|performed|requested)[ \t]+by\b[ \t]*:?[ \t]*(?P<v>{_COMMA}|{_FULL})",
            _is_person,
        ),
        (
            "name",
            r"\b(?i:(?:patient|pt|full|last|first|family|given|maiden)?(?:'s)?[ \t]*name|radiologist|technologist"
            r"|physician|provider|attending(?:[ ]physician)?|resident|fellow|next[ ]of[ ]kin|emergency[ ]contact|cc)"
            rf"[ \t]*[:=][ \t]*(?P<v>{_COMMA}|{_FULL})",
            _is_person,
        ),
        ("name", rf"\b(?i:patient|pt|mother|father|wife|husband)[ \t]*:[ \t]*(?P<v>{_COMMA}|{_TWO})", _is_person),
        (
            "name",
            r"\b(?i:discussed[ ]with|communicated[ ](?:to|with)|conveyed[ ]to|reported[ ]to|relayed[ ]to|paged|notified"
            rf"|informed|spoke[ ](?:to|with)|telephoned[ ]to)[ \t\n]+(?P<v>{_TWO})",
            _is_name,
        ),
        ("name", rf"\b(?P<v>{_TWO}),?[ \t]+{_DEGREE}", _is_name),
        ("name", rf"\b(?P<v>{_TWO})[ \t]+is[ ]an?[ ]\d{{1,3}}[ -]?(?:year|yr|y/?o|month|week|day)", _is_name),
        # dates
        (
            "date",
            r"(?i:\bD\.?O\.?B\.?|\bdate[ ]of[ ]birth|\bborn(?:[ ]on)?)[ \t]*[:=]?[ \t]*(?P<v>\d[\d./ -]{4,}\d)",
            None,
        ),
        ("date", rf"(?<![\w./-]){_Y}([-/.]){_M}\1{_D}(?![\d/-])", None),
        ("date", rf"(?<![\w./-])(?:{_M}([-/]){_D}|{_D}([-/]){_M})(?:\1|\2)(?:{_Y}|\d\d)(?![\w/-])", None),
        ("date", rf"(?<![\w./-])(?:{_M}[-/]{_D}|{_D}[-/]{_M})[-/](?:{_Y}|\d\d)(?![\w/-])", None),
        (
            "date",
            rf"(?<![\w./-])(?:{_M}\.{_D}|{_D}\.{_M})\.{_Y}(?![\d/-])|(?<![\w.])\d\d\.\d\d\.\d\d(?![\w.]*\d)",
            None,
        ),
        ("date", rf"\b(?i:on|dated|from|since|of)[ ](?P<v>{_D}\.{_M}\.\d\d)(?![\w/-]|\.\d)", None),
        ("date", rf"(?<![\w./-]){_M}/{_Y}(?![\d/-])", None),
        ("date", rf"\b(?i:on|dated|since|until|date:)[ \t\n]+(?P<v>{_M}/{_D})(?!\d|[/.-]\d)", None),
        ("date", rf"(?<!\w){_D}(?:st|nd|rd|th)?[ -]?(?:of[ ])?{_MONTH}\b\.?(?:[ -]?,?[ ]?(?:{_Y}|'?\d\d)\b)?", None),
        ("date", rf"\b{_MONTH}\.?[ ]{_D}(?:st|nd|rd|th)?\b(?!\s?(?:mm|cm|mg|%|\.\d))(?:,?[ ]{_Y}\b)?", None),
        ("date", rf"\b{_MONTH}\.?,?[ ](?:of[ ])?(?:{_Y}|'\d\d)\b", None),
        (
            "date",
            rf"\b(?i:in|since|dated|last|early|late)[ ](?P<v>(?!May\b|MAY\b|March\b|MARCH\b|Mar\b){_MONTH})\b",
            None,
        ),
        ("date", r"(?<![\w.])(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\w|\.\d)", None),
        # ages over 89
        (
            "age",
            r"(?<![\w.])(?P<v>9\d|1[0-3]\d)(?:[ \t-]*(?:years?[ \n-]*old|yrs?[ -]*old|y\.?/?o\.?(?=[MFmf]?\b|\W)"
            r"|years?[ ]of[ ]age)|[MF]\b|[ -][MF]\b(?=,|[ ](?:with|w/|s/p|presents|presenting|who)))",
            None,
        ),
        ("age", r"\b(?i:age|aged)(?:[ ]of)?[ \t]*:?[ \t]*(?P<v>9\d|1[0-3]\d)\b(?!\s?(?:%|mm|cm))", None),
        (
            "age",
            r"\b(?P<v>(?i:ninety(?:[ -](?:one|two|three|four|five|six|seven|eight|nine))?))[ -]years?[ -]old",
            None,
        ),
        # phones
        (
            "phone",
            r"(?<![\w.+-])(?:\+?1[-. ]?)?(?:\(\d{3}\)[ ]?|\d{3}[-. ])\d{3}[-. ]\d{4}(?:[ ]*(?:x|ext\.?)[ ]*\d+)?(?!\w)",
            None,
        ),
        ("phone", r"(?<!\w)\+\d{1,3}[ -]?\(?\d[\d() -]{5,}\d(?!\w)", None),
        (
            "phone",
            r"\b(?i:phone|tel|telephone|fax|pager|beeper|mobile|cell[ ]phone|extension|ext\.)[ \t]*(?i:number|no\.?|#)?"
            r"[ \t]*[:#.]?[ \t]*(?P<v>[+(]?\d[\d ()./-]{2,}\d)",
            _enough_digits,
        ),
        ("phone", r"(?<![\w.,-])[2-9]\d\d-\d{4}(?!\w|-|\s?(?:mm|cm|mg|ml|mL|cc|HU|g|ms|Hz)\b|%)", None),
        # record, accession and other numbers
        ("id", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", None),
        (
            "id",
            r"\b(?i:MRN|MR[ ]?#|medical[ ]record|record[ ]number|patient[ ]?id|pt[ ]?id|patient[ ]number|accession"
            r"|acc[ ]?#|SSN|social[ ]security|NHS|CSN|FIN|insurance|policy|member[ ]?id|serial|health[ ]plan"
            r"|(?:account|acct|case|visit|encounter|order|requisition|exam|study|license|specimen)"
            r"(?=[ \t]*(?:id|no\.|number|\#|:)))"
            rf"[ \t]*(?i:number|num\.?|no\.?|id)?[ \t]*(?:is|[#:=])*[ \t]*#?[ \t]*(?P<v>{_VALUE})",
            None,
        ),
        ("id", r"(?<![\w-])(?!PMC|NCT|PMID|ISBN)[A-Z]{1,5}-?\d{6,}(?![\w-])", None),
        ("id", r"(?<![\w-])(?!PMC|NCT)[A-Z]{1,3}-?\d\d-\d{4,8}(?![\w-])|(?<![\w.-])\d\d-\d{6,8}(?![\w-])", None),
        ("id", r"(?<![\w.,#-])\d{7,}(?![\w%]|[.,-]\d)", None),
        # addresses
        (
            "address",
            rf"(?<![\w.])\d{{1,5}}[ ](?:[NSEW]\.?[ ])?(?:(?:{_WORD}|\d+(?:st|nd|rd|th))[ ]){{1,3}}{_STREET}\b\.?",
            None,
        ),
        ("address", r"\bP\.?[ ]?O\.?[ ]Box[ ]\d+", None),
        ("address", rf"\b{_WORD}(?:[ ]{_WORD}){{0,2}},[ \t]*(?:{_STATES})[ \t]+\d{{5}}(?:-\d{{4}})?(?!\w)", None),
        ("address", r"\b(?i:zip(?:[ ]?code)?)[ \t]*:?[ \t]*(?P<v>\d{5}(?:-\d{4})?)(?!\w)", None),
    ]
]


def scan(text: str) -> list[Finding]:
    """What looks like PHI, in the order of the text and without overlaps. Finding nothing proves nothing."""
    taken: list[Finding] = []
    for kind, pattern, check in _RULES:
        for match in pattern.finditer(text):
            group = "v" if "v" in pattern.groupindex else 0
            start, end = match.span(group)
            if kind == "name" and "\n" in match.group(group) and not _is_name(match.group(group).split("\n")[1]):
                end = start + match.group(group).index("\n")
            if check is not None and not check(match.group(group)):
                continue
            if all(end <= other.start or start >= other.end for other in taken):
                taken.append(Finding(kind, start, end, text[start:end]))
    return sorted(taken, key=lambda finding: finding.start)


def mask(text: str) -> tuple[str, list[Finding]]:
    """The text with every finding of :func:`scan` replaced by its kind, as in ``[DATE]``, and the findings."""
    findings, pieces, end = scan(text), [], 0
    for finding in findings:
        pieces += [text[end : finding.start], f"[{finding.kind.upper()}]"]
        end = finding.end
    return "".join([*pieces, text[end:]]), findings


_END = re.compile(
    r"[.!?]+[\"')\]]*(?=\s)|\n(?=[ \t]*\n)|\n(?=[ \t]*_{4,}[ \t]*(?:\n|$))|\n(?=[ \t]*(?:[-*•]|\d{1,2}[.)])[ \t])"
)
_TITLES = _words("dr drs mr mrs ms prof st vs cf fig figs approx e.g i.e eg ie ca resp")
_MAYBE = _words("a.m p.m am pm etc jr sr inc m.d ph.d no nos")


def sentences(text: str) -> Iterator[str]:
    """Pieces that join to the text. In doubt two sentences stay one, so that a mask takes its whole context along."""
    start = 0
    for match in _END.finditer(text):
        if match.start() < start:
            continue
        before = text[start : match.start()]
        following = text[match.end() :].lstrip()[:1]
        if match.group()[0] in ".!?":
            word = before.split()[-1].lstrip("([\"'") if before.split() else ""
            number_alone = re.fullmatch(r"\s*\d{1,2}", before) is not None  # "1." opens a list entry
            initial = len(word) == 1 and word.isalpha() and word.isupper()  # "T. cruzi", "J. Smith"
            unsure = word.lower() in _MAYBE and not (following.isupper() and word.lower() not in ("no", "nos"))
            if word.lower() in ("no", "nos"):
                unsure = following.isdigit()
            if number_alone or initial or unsure or word.lower() in _TITLES:
                continue
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def drop_masked_sentences(text: str, mask: str = "___") -> str:
    """The text without the sentences that hold ``mask`` (a de-identified gap); "" where none is left.

    Lines may be wrapped; blank lines, list entries and rules of underscores end a sentence too.
    """
    return "".join(s for s in sentences(text) if mask not in s).strip()
