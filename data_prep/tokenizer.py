"""Train a tokenizer and save it as a Hugging Face folder: SentencePiece for a language model, WordPiece for a BERT.

SentencePiece comes with ``<image>`` and a short chat template. Its text survives exactly: no normalisation, no dummy
space in front, unknown characters as bytes. (One exception that is SentencePiece's own: a literal U+2581 comes back as
a space.)
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import sentencepiece
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from medvlm.data.schema import IMAGE_MARK
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError

Kind = Literal["sentencepiece", "wordpiece"]
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_MARK)  # ids 0 to 4
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
# No role names: a question ends with a line break, an answer with </s>, and an image is "<image>" and a line break.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- set text.value = text.value + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- text.value | trim -}}{{- eos_token if message['role'] == 'assistant' else '\\n' -}}"
    "{%- endfor -%}"
    # The line break after a question already invites the answer; the branch exists so that callers may ask for it.
    "{%- if add_generation_prompt -%}{{- '' -}}{%- endif -%}"
)


def shard_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Every message and report section of a shard set, in stored order."""
    reader = ShardReader(paths)
    for i in range(len(reader)):
        sample = reader.sample(i)
        for message in sample.messages:
            if message.text:
                yield message.text
        yield from sample.report.values()


def file_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The lines of UTF-8 text files."""
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                yield from file
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def train_sentencepiece(corpus: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """A byte-pair SentencePiece model (``tokenizer.model``); the same corpus gives the same bytes.

    Digits are pieces of their own ("12.5 cm" is read digit by digit), unless ``options`` of the trainer say otherwise.
    Raises UserError where the corpus is empty or does not support ``vocab_size``, with the size that works.
    """
    # SentencePiece takes a line at a time; images and line breaks never lie inside a piece.
    lines = (line for text in corpus for part in text.split(IMAGE_MARK) for line in part.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,  # bytes; longer lines would be skipped
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            user_defined_symbols=[IMAGE_MARK],
            num_threads=1,
            minloglevel=2,
            **{"byte_fallback": True, "split_digits": True, "add_dummy_prefix": False} | options,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab-size {vocab_size} is too large for this corpus: at most {found[1]}, or give more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"vocab-size {vocab_size} is too small for the characters of this corpus: at least {found[1]}"
    if "sentences_.empty()" in message:
        return "the corpus is empty: give shards or text files with at least one line of text"
    return f"SentencePiece could not train a vocabulary of {vocab_size}: {message}"


def to_fast(model: bytes) -> PreTrainedTokenizerFast:
    """The same tokenizer, with the same ids, in the fast format that gives character offsets."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {spm.id_to_piece(i): i for i in range(spm.get_piece_size())}
    plain = {
        piece for piece, i in vocabulary.items() if not (spm.is_control(i) or spm.is_byte(i) or spm.is_unknown(i))
    } - {IMAGE_MARK}
    # SentencePiece ranks by the merged piece alone; ids of merged pieces are in that order, single characters last.
    merges = [
        (piece[:n], piece[n:])
        for piece in vocabulary
        if piece in plain
        for n in range(1, len(piece))
        if piece[:n] in plain and piece[n:] in plain
    ]
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    image = AddedToken(IMAGE_MARK, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[image],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(corpus: Iterable[str], out: Path, vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """Train on ``corpus`` and write the folder; returns the tokenizer. Raises UserError as `train_sentencepiece`."""
    model = train_sentencepiece(corpus, vocab_size)
    tokenizer = to_fast(model)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(out))
    (out / "tokenizer.model").write_bytes(model)
    config = out / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to transformers 4 and 5 alike
    part = config.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, config)
    return tokenizer


def build_wordpiece(corpus: Iterable[str], out: Path, vocab_size: int = 8000) -> BertTokenizer:
    """A BERT tokenizer, in lower case, trained on ``corpus`` and written to the folder.

    Its pieces are those that SentencePiece's byte-pair training finds in BERT's words, since tokenizers' own trainer
    gives another vocabulary each time. Raises UserError as `train_sentencepiece`.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = (normalizer.normalize_str(text.replace(IMAGE_MARK, " ")) for text in corpus)
    words = [" ".join(word for word, _ in splitter.pre_tokenize_str(text)) for text in texts]
    model = train_sentencepiece(words, vocab_size, byte_fallback=False, add_dummy_prefix=True, split_digits=False)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    found = [spm.id_to_piece(i) for i in range(spm.get_piece_size()) if not (spm.is_control(i) or spm.is_unknown(i))]
    pieces = [piece[1:] if piece[0] == "▁" else f"##{piece}" for piece in found if piece not in ("▁", IMAGE_MARK)]
    # every character, so that no word is unknown
    characters = [prefix + c for c in sorted(set("".join(words)) - {" "}) for prefix in ("", "##")]
    every = dict.fromkeys([*BERT_SPECIAL, *characters, *pieces])
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(list(every)[:vocab_size])}, do_lower_case=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(out))
    return tokenizer


def train_tokenizer_folder(
    out: Path,
    shards: Sequence[Path] = (),
    text: Sequence[Path] = (),
    vocab_size: int = 8000,
    kind: Kind = "sentencepiece",
) -> dict[str, Any]:
    """Train on the text of shards and files; returns the figures that `prepare` prints."""
    if not shards and not text:
        raise UserError("nothing to learn from: give --shards, --text, or both")
    texts = [*(shard_texts(shards) if shards else ()), *file_texts(text)]
    tokenizer = build(texts, out, vocab_size) if kind == "sentencepiece" else build_wordpiece(texts, out, vocab_size)
    return {
        "folder": str(out),
        "vocab_size": len(tokenizer),
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]),
    }


def prepare(
    out: Annotated[Path, typer.Argument(help="Folder for the tokenizer.")],
    shards: Annotated[list[Path] | None, typer.Option(help="Shards, or folders of them, to learn from.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text files to learn from.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, the special and byte tokens included.")] = 8000,
    kind: Annotated[
        Kind, typer.Option(help="sentencepiece for a language model, wordpiece for a BERT.")
    ] = "sentencepiece",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a tokenizer on the text of shards and files."""
    report = train_tokenizer_folder(out, shards or (), text or (), vocab_size, kind)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    density = report["characters"] / report["tokens"]
    print(f"{out}: {report['vocab_size']} tokens from {report['texts']} texts; {density:.2f} characters per token")
