"""Patient-level splits without a table: a keyed hash of the patient decides, on every machine and in every part."""

import hashlib
import hmac

from medvlm.data.schema import Split
from medvlm.errors import UserError

SPLITS: tuple[Split, Split, Split] = ("train", "validation", "test")
BUCKETS = 1000


def assign(group: str, *, key: str = "medvlm", shares: tuple[int, int, int] = (80, 10, 10)) -> Split:
    """The split of a patient (or of the nearest thing known, see ``Sample.group``): HMAC-SHA256 modulo 1000.

    A patient's split never depends on which other patients there are, so a grown archive keeps its splits. ``shares``
    are per cent of train, validation and test; another ``key`` gives another draw. Raises UserError for shares that do
    not sum to 100, and for an empty group, which would put all unknown patients into one split.
    """
    if sum(shares) != 100 or min(shares) < 0 or len(shares) != len(SPLITS):
        raise UserError(f"shares: {tuple(shares)} must be three whole per cents that sum to 100, like 80 10 10")
    if not group:
        raise UserError("group: is empty; a split by hash needs a patient, study or image id")
    bucket = int.from_bytes(hmac.new(key.encode(), group.encode(), hashlib.sha256).digest(), "big") % BUCKETS
    upper = 0
    for split, share in zip(SPLITS, shares, strict=True):
        upper += share * BUCKETS // 100
        if bucket < upper:
            return split
    raise AssertionError("unreachable: the shares sum to 100")
