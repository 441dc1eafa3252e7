"""What dual encoders are fed: images and texts of samples, paired or each with labels."""

import json
from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from conftest import medvlm
from dual_world import make_pairs, pairs_recipe
from toy import png, volume_sample
from transformers import AutoTokenizer, SiglipImageProcessor

from data_prep.tokenizer import build_wordpiece
from medvlm.data.augment import Augment
from medvlm.data.conversation import IGNORE
from medvlm.data.images import ImageTransform
from medvlm.data.loader import MicroBatches, load_batches
from medvlm.data.pair_text import TextEncoder, choose_text, section_sentences
from medvlm.data.pairs import EncodedPair, PairEncoder, collate_pairs
from medvlm.data.pictures import look
from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader, write_shards
from medvlm.errors import UserError

FINDINGS = "The heart is enlarged. A nodule of 3.5 cm is seen. Dr. Smith was told. No pleural effusion is seen."
SENTENCES = [
    "The heart is enlarged.",
    "A nodule of 3.5 cm is seen.",
    "Dr. Smith was told.",
    "No pleural effusion is seen.",
]
IMPRESSION = "1. Cardiomegaly as before. 2. No effusion."
TRANSFORM = ImageTransform(SiglipImageProcessor(size={"height": 32, "width": 32}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_wordpiece([FINDINGS, IMPRESSION] * 9, tmp_path_factory.mktemp("tokenizer"), 110)


def study(i: int, views=("PA",), prior: bool = False, **values) -> tuple[Sample, dict[str, bytes]]:
    images = [{"file": f"{n}.png", "width": 40, "height": 40, "view": view} for n, view in enumerate(views)]
    if prior:
        images.append(
            {"file": f"{len(images)}.png", "width": 40, "height": 40, "view": "PA", "metadata": {"role": "prior"}}
        )
    fields = {
        "key": f"s{i:04d}",
        "source": "toy",
        "license": "CC0-1.0",
        "split": "train",
        "images": images,
        "report": {"findings": FINDINGS, "impression": IMPRESSION, "indication": "Cough and fever since days."},
        **values,
    }
    return Sample.model_validate(fields), {f"{n}.png": png(10 * i + n) for n in range(len(images))}


def encode(encoder: PairEncoder, made: tuple[Sample, dict[str, bytes]], epoch: int | None = None) -> EncodedPair:
    return encoder(made[0], list(made[1].values()), epoch)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (FINDINGS, SENTENCES),
        ("1. Clear\nlungs. 2. See No. 2.\n3. ___ nodule.", ["1. Clear lungs.", "2. See No. 2."]),
        ("Compared to ___, stable. No edema.", ["No edema."]),
        ("___.", []),
    ],
)
def test_sentences_survive_numbers_titles_lists_and_lose_masks(text, found):
    sample, _ = study(0, report={"impression": text})
    assert section_sentences(sample, ["findings", "impression"]) == ([found] if found else [])


def test_sections_come_in_the_order_asked_and_captions_are_the_answers(tokenizer):
    sample, _ = study(0)
    read = partial(PairEncoder, tokenizer, TRANSFORM, 64)
    assert read(sections=["impression", "findings", "comparison"]).read(sample) == f"{IMPRESSION} {FINDINGS}"
    caption = [
        {"role": "user", "content": "<image>\nDescribe the image."},
        {"role": "assistant", "content": "CT of the chest, axial."},
    ]
    sample, _ = study(0, messages=caption, report={})
    assert read(sections=["answers"]).read(sample) == "CT of the chest, axial."


def test_a_sentence_is_drawn_anew_each_epoch_and_is_the_first_without_one(tokenizer):
    encoder = PairEncoder(tokenizer, TRANSFORM, 64, text="sentence", min_words=4)
    sample, _ = study(0)
    drawn = Counter(encoder.read(sample, epoch) for epoch in range(400))
    assert set(drawn) == set(SENTENCES), "those of three words and list numbers are not drawn"
    assert min(drawn.values()) > 60, "each of four in about a hundred of 400 epochs"
    assert encoder.read(sample) == "The heart is enlarged."
    assert [encoder.read(sample, e) for e in range(9)] != [encoder.read(study(1)[0], e) for e in range(9)]


def test_either_is_the_report_or_a_sentence_half_of_the_time(tokenizer):
    encoders = {t: PairEncoder(tokenizer, TRANSFORM, 64, text=t) for t in ("either", "report", "sentence")}
    drawn = {t: [encoder.read(study(0)[0], epoch) for epoch in range(400)] for t, encoder in encoders.items()}
    (whole,) = set(drawn["report"])
    assert 160 < drawn["either"].count(whole) < 240
    assert set(drawn["either"]) == {whole} | set(drawn["sentence"])
    assert encoders["either"].read(study(0)[0]) == whole, "nothing is drawn without an epoch"


def test_shuffled_sentences_stay_in_their_section(tokenizer):
    encoder = PairEncoder(tokenizer, TRANSFORM, 64, shuffle_sentences=True)
    sample, _ = study(0)
    seen = {encoder.read(sample, epoch) for epoch in range(600)}
    assert len(seen) == 24 * 2, "every order of four and of two sentences"
    for text in seen:
        assert text.index("Cardiomegaly") > max(text.index("Smith"), text.index("3.5 cm"), text.index("pleural"))
        assert sorted(text.split()) == sorted((FINDINGS + IMPRESSION[2:].replace("2. ", "")).split())
    assert encoder.read(sample) == f"{FINDINGS} {IMPRESSION}"


def test_altered_texts_have_words_swapped_or_left_out_and_keep_their_labels(tokenizer):
    made = study(0)
    labels = {
        "labels": ["Cardiomegaly"],
        "labeler": lambda text: {"Cardiomegaly": int("The heart is enlarged" in text)},
    }
    encoder = PairEncoder(tokenizer, TRANSFORM, 64, alter_words=0.5, **labels)
    text = encoder.read(made[0])
    drawn = [encoder.altered(text, made[0], epoch) for epoch in range(400)]
    changed = [t.split() for t in drawn if t != text]
    assert 150 < len(changed) < 250, "half of them"
    swapped = [t for t in changed if len(t) == len(text.split())]
    assert 60 < len(swapped) < 140 and all(sorted(t) == sorted(text.split()) for t in swapped), "half of these"
    assert all(sum(a != b for a, b in zip(t, text.split(), strict=True)) == 2 for t in swapped)
    left = [len(t) / len(text.split()) for t in changed if len(t) < len(text.split())]
    assert 0.84 < sum(left) / len(left) < 0.92
    words = iter(text.split())
    short = min(changed, key=len)
    assert all(word in words for word in short), "what is left keeps its order"
    assert encoder.altered(text, made[0], None) == text and drawn[7] == encoder.altered(text, made[0], 7)
    pairs = [encode(encoder, made, epoch) for epoch in range(40)]
    assert len({tuple(pair.ids) for pair in pairs}) > 10 and {pair.text_labels[0] for pair in pairs} == {1.0}


def test_long_texts_are_cut_before_their_last_special_token(tokenizer):
    encoder = PairEncoder(tokenizer, TRANSFORM, 12)
    pair, whole = encode(encoder, study(0)), tokenizer(f"{FINDINGS} {IMPRESSION}")["input_ids"]
    assert pair.truncated and pair.ids == [*whole[:11], tokenizer.sep_token_id]
    short = encode(PairEncoder(tokenizer, TRANSFORM, len(whole)), study(0))
    assert not short.truncated and short.ids == whole
    batch = collate_pairs([pair, short, short], pad_id=0, image_size=32, max_length=64)
    assert batch.truncated == 1 and batch.lengths == [12, len(whole), len(whole)]
    assert batch.input_ids.shape[1] % 8 == 0 and batch.slots == batch.input_ids.numel()


def test_the_image_is_of_a_wanted_view_and_never_the_prior(tokenizer):
    encoder = PairEncoder(tokenizer, TRANSFORM, 64, views=["PA", "AP"], prior=True)
    made = study(0, views=("LATERAL", "AP", "PA"), prior=True)
    drawn = Counter(encoder.choose_image(made[0], epoch) for epoch in range(200))
    assert set(drawn) == {1, 2} and min(drawn.values()) > 70 and encoder.choose_image(made[0]) == 1
    pair = encode(encoder, made)
    assert torch.equal(pair.image, TRANSFORM(made[1]["1.png"], "")) and torch.equal(
        pair.prior, TRANSFORM(made[1]["3.png"], "")
    )
    alone = encode(encoder, study(1))
    assert alone.prior is None
    batch = collate_pairs([pair, alone], pad_id=0, image_size=32, max_length=64, prior=True)
    assert batch.has_prior.tolist() == [True, False] and batch.prior_pixel_values.shape == (2, 1, 32, 32)
    assert torch.equal(batch.prior_pixel_values[0], pair.prior) and not batch.prior_pixel_values[1].any()
    assert encode(PairEncoder(tokenizer, TRANSFORM, 64), made).prior is None, "not asked for"


def test_masks_follow_bert(tokenizer):
    """80 % masks, 10 % other tokens, 10 % kept, of 15 % of the tokens that are not special."""
    encoder = TextEncoder(tokenizer, 64, 0.15)
    ids, _ = encoder(FINDINGS)
    rng = np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    for _ in range(3000):
        masked, labels = encoder.mask(ids, Random(int(rng.integers(2**31))))
        assert any(label != IGNORE for label in labels)
        for n, (old, new, label) in enumerate(zip(ids, masked, labels, strict=True)):
            assert label in (IGNORE, old) and (label != IGNORE or new == old)
            if n in (0, len(ids) - 1):
                assert label == IGNORE, "special tokens stay"
            elif label != IGNORE:
                kinds["mask" if new == tokenizer.mask_token_id else "kept" if new == old else "other"] += 1
                assert new == tokenizer.mask_token_id or new not in tokenizer.all_special_ids
            kinds["all"] += 0 < n < len(ids) - 1
    chosen = kinds["mask"] + kinds["kept"] + kinds["other"]
    assert chosen / kinds["all"] == pytest.approx(0.15, abs=0.01)
    assert [kinds[k] / chosen for k in ("mask", "other", "kept")] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    _, labels = TextEncoder(tokenizer, 64, 1e-9).mask(ids, Random(0))
    assert sum(label != IGNORE for label in labels) == 1, "at least one"


LABELS = ["Cardiomegaly", "Edema", "Pleural Effusion"]


def labeler(text: str) -> dict[str, int | None]:
    return {
        "Cardiomegaly": 1 if "enlarged" in text or "Cardiomegaly" in text else None,
        "Edema": None,
        "Pleural Effusion": 0 if "No" in text else None,
    }


def test_labels_are_the_samples_own_or_those_of_its_text(tokenizer):
    unpaired = partial(PairEncoder, tokenizer, TRANSFORM, 64, labels=LABELS, paired=False, labeler=labeler)
    own = study(0, labels={"Edema": -1, "Cardiomegaly": 1, "Fracture": 1, "Pleural Effusion": None})
    pair = encode(unpaired(), own)
    assert pair.image_labels == pair.text_labels == [1, -1, 0]
    pair = encode(unpaired(text="sentence"), own)
    assert (pair.image_labels, pair.text_labels) == ([1, -1, 0], [1, 0, 0]), "a sentence says what it says"
    either = [encode(unpaired(text="either"), own, epoch).text_labels for epoch in range(40)]
    assert [1, -1, 0] in either and [1, 0, 0] in either, "the sample's own are those of its report only"
    pair = encode(unpaired(text="sentence"), study(0))
    assert pair.image_labels == [1, 0, 0] and pair.text_labels == [1, 0, 0], "of the report, and of its first sentence"
    with pytest.raises(UserError, match=r"has none of the labels Cardiomegaly, .* and no labeler"):
        encode(unpaired(labeler=None), study(0))
    with pytest.raises(UserError, match=r"has none of the labels Cardiomegaly, .* and no report"):
        encode(unpaired(), study(0, report={"indication": "Cough."}))
    for labels in ({"Edema": 1}, {}):  # one of the sample's own beside it, or none
        with pytest.raises(UserError, match="neither the sample nor the labeler has a label 'Oedma'"):
            encode(unpaired(labels=["Edema", "Oedma"]), study(0, labels=labels))


def test_sides_of_unpaired_batches_have_their_own_sizes(tokenizer):
    encoder = PairEncoder(tokenizer, TRANSFORM, 64, labels=LABELS, paired=False, labeler=labeler, masking=0.15)
    known = {"Edema": 1}
    image_only, text_only = study(0, report={"indication": "Cough."}, labels=known), study(1, views=())
    collate = partial(collate_pairs, pad_id=0, image_size=32, max_length=64, labels=3, masking=True, paired=False)
    batch = collate([encode(encoder, made) for made in (image_only, text_only, study(2), study(3, views=()))])
    assert (batch.images, batch.texts, batch.targets) == (2, 3, 5)
    assert batch.pixel_values.shape[0] == len(batch.image_labels) == 2 and len(batch.text_labels) == 3
    assert len(batch.input_ids) == len(batch.masked_ids) == 3 and batch.masked_tokens >= 3
    assert set(batch.inputs(torch.device("cpu"))) == {
        "pixel_values", "input_ids", "attention_mask", "masked_ids", "masked_labels"
    }  # fmt: skip
    for made, sizes in (([image_only], (1, 0)), ([text_only], (0, 1)), ([], (0, 0))):
        batch = collate([encode(encoder, one) for one in made])
        assert (batch.images, batch.texts, batch.targets) == (*sizes, sum(sizes))
        assert batch.pixel_values.shape == (1, 1, 32, 32) and len(batch.input_ids) == 1, "a blank row at least"
        assert batch.image_labels.shape == batch.text_labels.shape == (1, 3)
        assert batch.attention_mask.any(1).all(), "an attention over nothing is not a number"
        assert (batch.tokens > 0) == (batch.masked_tokens > 0) == bool(batch.lengths) == bool(sizes[1])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"report": {"findings": "Compared to ___."}}, {}, "empty report: nothing to read in findings, impression"),
        ({"report": {"findings": "Normal."}}, {}, "its report has less than 3 words"),
        ({"report": {"findings": "Normal. Clear."}}, {"text": "sentence"}, "no sentence of its report has 3 words"),
        ({"views": ()}, {}, "no image, and an image and a text make a pair"),
        ({"views": ("LATERAL",)}, {"views": ["PA", "AP"]}, "no image of the views PA, AP"),
        ({"views": (), "report": {"indication": "Cough."}}, {"paired": False}, "empty report"),
    ],
)
def test_samples_that_make_no_pair_say_why(tokenizer, values, options, message):
    with pytest.raises(UserError, match=message):
        encode(PairEncoder(tokenizer, TRANSFORM, 64, **options), study(0, **values))


def test_volumes_and_unfit_tokenizers_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds a volume"):
        encode(PairEncoder(tokenizer, TRANSFORM, 64), volume_sample(0, 4))
    with pytest.raises(UserError, match=r"data\.max_length: 2 leaves no room"):
        PairEncoder(tokenizer, TRANSFORM, 2)
    bare = build_wordpiece([FINDINGS], tmp_path, 60)
    bare.mask_token = None
    with pytest.raises(UserError, match="has no mask token"):
        PairEncoder(bare, TRANSFORM, 64, masking=0.15)


@pytest.fixture
def dataset(tmp_path, tokenizer) -> MicroBatches:
    sections = ["indication" if i == 3 else "findings" for i in range(8)]
    made = [study(i, ("PA", "AP"), prior=i % 2 == 0, report={name: FINDINGS}) for i, name in enumerate(sections)]
    write_shards(made, tmp_path / "shards", "toy", 3)
    encoder = PairEncoder(
        tokenizer, TRANSFORM, 64, text="sentence", prior=True, masking=0.15,
        augment=Augment(rotate=20, crop=0.6, contrast=0.4), seed=5,
    )  # fmt: skip
    collate = partial(
        collate_pairs, pad_id=tokenizer.pad_token_id, image_size=32, max_length=64, prior=True, masking=True
    )
    return MicroBatches(ShardReader(tmp_path / "shards"), encoder, collate)


def test_batches_depend_on_sample_epoch_and_seed_alone(dataset):
    work = [[(n, epoch) for n in range(first, first + 4)] for epoch in (0, 1) for first in (0, 4)] + [[]]
    here, there = (list(load_batches(dataset, iter(work), workers)) for workers in (0, 2))
    for a, b in zip(here, there, strict=True):
        assert a.keys == b.keys and a.not_taken == b.not_taken
        mine, others = a.inputs(torch.device("cpu")), b.inputs(torch.device("cpu"))
        assert mine.keys() == others.keys() and all(torch.equal(mine[k], others[k]) for k in mine)
    assert not here[0].quarantined
    assert here[0].not_taken == [("s0003", "empty report: nothing to read in findings, impression")]
    assert here[0].images == here[0].texts == here[0].targets == 3
    assert not torch.equal(here[1].pixel_values, here[3].pixel_values), "another epoch, other pixels"
    assert here[4].targets == here[4].tokens == 0 and here[4].has_prior.tolist() == [False]
    again = dataset[work[3][::-1]]
    assert torch.equal(again.pixel_values.flip(0), here[3].pixel_values), "whatever the order"
    plain = dataset[[(0, None)]]
    assert torch.equal(plain.pixel_values, dataset[[(0, None)]].pixel_values)
    assert torch.equal(plain.pixel_values[0], TRANSFORM(png(0), "")), "without an epoch, as it is"


def test_a_contact_sheet_shows_the_images_and_the_masked_text(dataset):
    card = look(dataset.reader, 0, dataset.encoder, epoch=0)
    pair = dataset.encoder(*dataset.reader.load(0), 0)
    assert [number for number, _ in pair.seen] in ([0, 2], [1, 2]), "a view, and the prior image"
    assert np.array_equal(card.pictures[0].pixels, pair.image[0].numpy()) and len(card.pictures) == 2
    assert "".join(p.text for p in card.pieces) == dataset.encoder.tokens.tokenizer.decode(pair.ids)
    assert card.counts == {"tokens": len(pair.ids), "image": 0, "supervised": sum(i != IGNORE for i in pair.labels)}
    assert look(dataset.reader, 3, dataset.encoder, epoch=0).reason.startswith("empty report")


def test_choosing_a_text_needs_no_section():
    assert choose_text([], sentence=False, shuffle=True, min_words=1, rng=None) is None
    assert choose_text([], sentence=True, shuffle=False, min_words=1, rng=None) is None


def test_shards_are_counted_and_shown_as_a_dual_encoders_recipe_reads_them(tmp_path):
    recipe = pairs_recipe(make_pairs(tmp_path), "counted")
    shards = tmp_path / "pairs" / "train"
    report = json.loads(medvlm("shards", "stats", shards, "--recipe", recipe, "--json"))
    reader, tokenizer = ShardReader(shards), AutoTokenizer.from_pretrained(tmp_path / "bert-tokenizer")
    texts = [" ".join(reader.sample(n).report[name] for name in ("findings", "impression")) for n in range(len(reader))]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    [row] = report["rows"] if isinstance(report, dict) else report
    assert row["tokens"]["max"] == max(lengths) > 64, "before it is cut"
    done = medvlm("shards", "show", shards, "--recipe", recipe, "--out", tmp_path / "sheet.html")
    assert f"{min(24, len(reader))} of {len(reader)} samples, 0 quarantined" in done
