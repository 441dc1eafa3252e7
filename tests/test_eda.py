"""Altered texts, and synonyms from WordNet's own files beside NLTK's."""

import random
import re
import shutil
from pathlib import Path

import pytest
from dual_world import make_pairs, pairs_recipe

from medvlm.config.load import load_recipe
from medvlm.data.eda import alter_words, exchange
from medvlm.data.wordnet import SPEECH, WordNet
from medvlm.errors import UserError
from medvlm.training.families import family_of

TEXT = "Heart size is normal, no heart failure. The left lung is clear."
DEBIAN = Path("/usr/share/wordnet")


def synonyms(word):
    return {"heart": ["cardiac organ"], "clear": ["plain", "open"], "no": ["nobelium"], "left": ["gone"]}.get(word, [])


def test_a_word_is_exchanged_wherever_it_stands_but_no_negation_and_no_side():
    drawn = [alter_words(TEXT, random.Random(n), synonyms) for n in range(900)]
    exchanged = {text for text in drawn if "organ" in text or "plain" in text or "open" in text}
    assert exchanged == {
        "Cardiac organ size is normal, no cardiac organ failure. The left lung is clear.",
        TEXT.replace("clear", "plain"),
        TEXT.replace("clear", "open"),
    }
    assert 250 < sum(text in exchanged for text in drawn) < 350, "one of three operations"
    assert not any("nobelium" in text or "gone" in text for text in drawn)
    assert alter_words(TEXT, random.Random(7), synonyms) == alter_words(TEXT, random.Random(7), synonyms)


def test_a_text_without_synonyms_stays_and_a_word_is_no_text_to_alter():
    assert {alter_words("no left", random.Random(n), synonyms) for n in range(99)} <= {
        "no left",
        "left no",
        "no",
        "left",
    }
    assert alter_words("clear", random.Random(0), synonyms) == "clear"
    short = "L PA T2 5cm non-clear"
    assert (
        exchange(short.split(), random.Random(0), lambda word: ["wrong"] if word != "non-clear" else [])
        == short.split()
    )


@pytest.fixture
def database(tmp_path) -> Path:
    """Of the formats of wndb(5), with the licence in front."""
    meanings = ["effusion outburst Gush", "focus centre nidus", "focus direction", "pleural_cavity galore(ip)"]
    licence = "  1 licence  \n"
    data, index = licence, {}
    for words in map(str.split, meanings):
        for word in words:
            index.setdefault(word.partition("(")[0].lower(), []).append(f"{len(data):08d}")
        data += f"{len(data):08d} 00 n {len(words):02x} {' '.join(w + ' 0' for w in words)} 000 | a gloss\n"
    lines = sorted(f"{word} n {len(at)} 1 @ {len(at)} 0 {' '.join(at)}  \n" for word, at in index.items())
    for speech in SPEECH:
        (tmp_path / f"data.{speech}").write_text(data if speech == "noun" else licence)
        (tmp_path / f"index.{speech}").write_text(licence + "".join(lines) if speech == "noun" else licence)
    (tmp_path / "noun.exc").write_text("foci focus\n")
    return tmp_path


def test_synonyms_of_all_meanings_and_of_inflected_forms(database):
    wordnet = WordNet(database)
    assert wordnet.synonyms("Effusions") == ["effusion", "gush", "outburst"]
    assert wordnet.synonyms("foci") == ["centre", "direction", "focus", "nidus"]
    assert wordnet.synonyms("pleural cavity") == ["galore"]
    assert wordnet.synonyms("aaa") == wordnet.synonyms("zzz") == wordnet.synonyms("fusion") == []


def test_a_database_that_lacks_a_file_is_refused(database):
    (database / "data.adj").unlink()
    with pytest.raises(UserError, match=r"data.adj cannot be read \(No such file or directory\); give the folder of a"):
        WordNet(database)
    (database / "data.adj").touch()
    with pytest.raises(UserError, match=r"data.adj cannot be read \(it is empty\)"):
        WordNet(database)


def test_a_recipe_names_the_database(tmp_path, database):
    folder = make_pairs(tmp_path / "pairs")
    pairs = {"alter_words": 1.0, "synonyms": str(database)}
    config = load_recipe(str(pairs_recipe(folder, "words", data__pairs=pairs)))
    family, parts = family_of(config.model), family_of(config.model).components(config)
    data = family.dataset(config, parts, config.data.train, training=True)
    encoder, study = data.encoder, data.reader.sample(0)
    drawn = {encoder.altered("a small effusion", study, epoch) for epoch in range(60)}
    assert {"a small gush", "a small outburst"} <= drawn
    held_out = family.dataset(config, parts, config.data.train, training=False).encoder
    assert {held_out.altered("a small effusion", study, epoch) for epoch in range(60)} == {"a small effusion"}
    (database / "index.verb").unlink()
    with pytest.raises(UserError, match=r"data.pairs.synonyms: .*index.verb cannot be read"):
        family.dataset(config, parts, config.data.train, training=True)


def test_wordnet_is_read_as_nltk_reads_it(tmp_path):
    nltk = pytest.importorskip("nltk", reason="nltk is not installed")
    if not DEBIAN.is_dir():
        pytest.skip("/usr/share/wordnet is missing: install Debian's wordnet-base")
    folder = tmp_path / "corpora" / "wordnet"
    shutil.copytree(DEBIAN, folder)
    (folder / "lexnames").write_text("".join(f"{n:02d}\tname\t1\n" for n in range(45)))  # Debian has none
    (folder / "index.sense").touch()
    nltk.data.path.insert(0, str(tmp_path))
    try:
        with pytest.warns(UserWarning, match="multilingual"):
            theirs = nltk.corpus.reader.WordNetCorpusReader(str(folder), None)
        ours = WordNet(DEBIAN)
        known = sorted(word for word in theirs.all_lemma_names() if word.isalpha() and word.isascii())
        words = random.Random(0).sample(known, 600)
        words += [word + end for word in words[:150] for end in ("s", "es", "ed", "ing", "er", "est")]
        words += ["geese", "men", "better", "children", "seen", "axes", "opacities", "effusions"]
        for word in words:
            names = {name.lower() for meaning in theirs.synsets(word) for name in meaning.lemma_names()}
            plain = {" ".join(re.sub("[^a-z ]", "", re.sub("[_-]", " ", name)).split()) for name in names}
            assert ours.synonyms(word) == sorted(plain - {word, ""}), word
    finally:
        nltk.data.path.remove(str(tmp_path))
