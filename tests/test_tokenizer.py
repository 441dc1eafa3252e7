"""The tokenizer folder against SentencePiece itself, and the texts against themselves."""

import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import typer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from data_prep.tokenizer import build, prepare, train_sentencepiece, train_tokenizer_folder
from medvlm.data.conversation import ConversationEncoder
from medvlm.data.schema import Message, Sample
from medvlm.data.shards import write_shards
from medvlm.errors import UserError

WORDS = re.findall(
    r"\S+", "heart lungs are clear no acute pneumothorax effusion left right lower lobe opacity of cm 12 3.5"
)
ODD = [
    "<image>\nfoo",
    "two  spaces, a tab\there ",
    " leading\n\nlines\r\n",
    "unseen: Ödem 肺炎 😀 µm",
    "a <image> b<image>\n<image>",
    "12.5 cm x 3mm",
    "",
]


def corpus() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    build(corpus(), out, vocab_size=380)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_sentencepiece(folder, tokenizer):
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(tokenizer) == spm.get_piece_size() == 380
    for text in corpus() + ODD:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == spm.encode(text), text
        assert tokenizer(text)["input_ids"] == spm.encode(text), "nothing is added around a text"


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in corpus() + ODD:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_unknown_characters_become_bytes_never_unk(tokenizer):
    ids = tokenizer("肺炎 😀")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert "<0xE8>" in tokenizer.convert_ids_to_tokens(ids)


def test_offsets_tell_which_characters_each_token_covers(tokenizer):
    assert tokenizer.is_fast
    text = "<image>\nHeart is clear, 12 cm"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[slice(*span)] for span in encoded["offset_mapping"]]
    assert pieces[:2] == ["<image>", "\n"] and "".join(pieces) == text


def test_special_tokens_have_their_places(tokenizer):
    names = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<pad>"]
    image = tokenizer.added_tokens_decoder[4]
    assert image.special and not image.lstrip and not image.rstrip
    assert tokenizer.decode(tokenizer("a <image>\nb")["input_ids"], skip_special_tokens=True) == "a \nb"


CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is the heart clear?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "No"}]},
    {"role": "user", "content": "Left?"},
    {"role": "assistant", "content": "right"},
]


def test_chat_template_is_compact_and_takes_strings_and_parts(tokenizer):
    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert render(CONVERSATION) == "<image>\nIs the heart clear?\nNo</s>Left?\nright</s>"
    assert render(CONVERSATION[:1], add_generation_prompt=True) == "<image>\nIs the heart clear?\n"
    strings = [{"role": "user", "content": "<image>\nIs the heart clear?"}, {"role": "assistant", "content": "No"}]
    assert render(strings) == render(CONVERSATION[:2])


def test_training_supervises_exactly_the_answers_and_their_end(tokenizer):
    encode = ConversationEncoder(tokenizer, tokenizer.chat_template, image_tokens=3)
    ids, labels = encode([Message.model_validate(m) for m in CONVERSATION])
    assert ids[:3] == [4, 4, 4] and ids[3] != 4
    assert tokenizer.decode([label for label in labels if label != -100]) == "No</s>right</s>"


def test_training_twice_gives_the_same_files(folder, tmp_path):
    build(corpus(), tmp_path, vocab_size=380)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir()) and "tokenizer.model" in names
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_an_impossible_vocabulary_size_names_one_that_works():
    with pytest.raises(UserError, match="too large for this corpus: at most") as error:
        train_sentencepiece(corpus(), 8000)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert train_sentencepiece(corpus(), largest)
    with pytest.raises(UserError, match="too large"):
        train_sentencepiece(corpus(), largest + 1)
    with pytest.raises(UserError, match="at least") as error:
        train_sentencepiece(corpus(), 100)
    assert train_sentencepiece(corpus(), int(str(error.value).split("at least ")[1]))
    with pytest.raises(UserError, match="the corpus is empty"):
        train_sentencepiece(["  ", "\n"], 400)


def test_learns_from_shards_and_text_files(tmp_path):
    base = {"source": "s", "license": "CC0-1.0", "split": "train"}
    texts = corpus()
    talk = {"messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]}
    items = [(Sample(key="a", **base, **talk), {}), (Sample(key="b", **base, report={"findings": texts[2]}), {})]
    write_shards(items, tmp_path / "shards", "s")
    (tmp_path / "notes.txt").write_text("\n".join(texts[3:50]), encoding="utf-8")
    report = train_tokenizer_folder(tmp_path / "out", [tmp_path / "shards"], [tmp_path / "notes.txt"], 350)
    assert (report["vocab_size"], report["texts"]) == (350, 50)


def test_the_command_reports_and_refuses(tmp_path):
    app = typer.Typer()
    app.command()(prepare)
    notes, latin = tmp_path / "notes.txt", tmp_path / "latin.txt"
    notes.write_text("\n".join(corpus()), encoding="utf-8")
    latin.write_bytes("Ödem".encode("latin-1"))
    arguments = [str(tmp_path / "out"), "--text", str(notes), "--vocab-size", "360", "--json"]
    assert json.loads(CliRunner().invoke(app, arguments).output)["vocab_size"] == 360
    with pytest.raises(UserError, match="nothing to learn from"):
        train_tokenizer_folder(tmp_path / "none")
    with pytest.raises(UserError, match="not UTF-8"):
        train_tokenizer_folder(tmp_path / "none", text=[latin])
    with pytest.raises(UserError, match="no such file"):
        train_tokenizer_folder(tmp_path / "none", text=[tmp_path / "absent.txt"])


def test_a_wordpiece_vocabulary_is_of_a_bert_and_always_the_same(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(corpus()))
    for name in "ab":
        text = [tmp_path / "corpus.txt"]
        report = train_tokenizer_folder(tmp_path / name, text=text, vocab_size=140, kind="wordpiece")
        assert report["vocab_size"] == 140
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("No effusion.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "no", "effusion", ".", "[SEP]"]
    assert tokenizer.unk_token_id not in tokenizer("stone 53 ion")["input_ids"], "pieces cover the characters"
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id] == [0, 1, 4]
    with pytest.raises(UserError, match="corpus is empty"):
        train_tokenizer_folder(tmp_path / "c", text=[write_empty(tmp_path)], kind="wordpiece")


def write_empty(folder: Path) -> Path:
    (folder / "empty.txt").write_text("")
    return folder / "empty.txt"
