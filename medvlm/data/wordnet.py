"""Synonyms from the files of a WordNet database, of the formats of its manual page wndb(5)."""

import mmap
import re
from pathlib import Path

from medvlm.errors import UserError

# Endings and what takes their place, of morphy(7).
ENDINGS = {
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}
SPEECH = {speech: [pair.split(":") for pair in pairs.split()] for speech, pairs in ENDINGS.items()}


class WordNet:
    """Words that share a meaning with a word, in any of its meanings.

    ``folder`` has index.noun, data.noun and so on: /usr/share/wordnet of Debian's wordnet-base, corpora/wordnet of
    NLTK's data, dict of Princeton's archive. The files are mapped, not read, so that forked workers share their pages.

    Raises UserError if a file is missing.
    """

    def __init__(self, folder: str | Path):
        self.files = {
            (kind, speech): _mapped(Path(folder) / f"{kind}.{speech}")
            for kind in ("index", "data")
            for speech in SPEECH
        }
        self.exceptions: dict[str, dict[str, list[str]]] = {}
        for speech in SPEECH:
            path = Path(folder) / f"{speech}.exc"  # absent where a language has none
            lines = path.read_text().splitlines() if path.is_file() else []
            self.exceptions[speech] = {form: bases for form, *bases in map(str.split, filter(str.strip, lines))}

    def synonyms(self, word: str) -> list[str]:
        """In order, lower case, without ``word`` itself; inflected words are looked up as what they are forms of."""
        found: set[str] = set()
        for speech in SPEECH:
            for form in self._forms(word.lower(), speech):
                for offset in self._offsets(form, speech):
                    found.update(self._words(offset, speech))
        return sorted(found - {word.lower(), ""})

    def _forms(self, word: str, speech: str) -> set[str]:
        irregular = self.exceptions[speech].get(word)
        if irregular:
            return {word, *irregular}
        regular = (word[: -len(end)] + other for end, other in SPEECH[speech] if word.endswith(end))
        return {word, *regular}

    def _offsets(self, form: str, speech: str) -> list[int]:
        """Where the sets of synonyms with this very word begin."""
        file, wanted = self.files["index", speech], form.replace(" ", "_").encode() + b" "
        low, high = 0, len(file)
        while low < high:  # to the first line that does not sort before the wanted one
            start = file.rfind(b"\n", low, (low + high) // 2) + 1 or low
            end = file.find(b"\n", start) + 1 or len(file)
            if file[start:end] < wanted:
                low = end
            else:
                high = start
        if file[low : low + len(wanted)] != wanted:
            return []
        fields = file[low : file.find(b"\n", low)].split()
        return [int(field) for field in fields[-int(fields[2]) :]]

    def _words(self, offset: int, speech: str) -> list[str]:
        file = self.files["data", speech]
        fields = file[offset : file.find(b"\n", offset)].decode().split()
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        return [_plain(word.partition("(")[0]) for word in words]  # of adjectives with a place, as "galore(ip)"


def _plain(word: str) -> str:
    """Letters and spaces, as EDA's authors keep them."""
    letters = re.sub("[^a-z ]", "", word.replace("_", " ").replace("-", " ").lower())
    return " ".join(letters.split())


def _mapped(path: Path) -> mmap.mmap:
    try:
        if not path.stat().st_size:
            raise OSError("it is empty")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(
            f"data.pairs.synonyms: {path} cannot be read ({error.strerror or error}); give the folder of a WordNet "
            "database, such as /usr/share/wordnet of Debian's wordnet-base, or null to go without"
        ) from None
