"""What the pictures of `shards show` and `shards stats` say, against the encoder, the pixels and the counts."""

import io
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import make_tokenizer
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedTokenizerFast, SiglipImageProcessorPil

from medvlm.data.augment import Augment
from medvlm.data.contact_sheet import contact_sheet, sheet_html
from medvlm.data.conversation import IGNORE, ConversationEncoder, multimodal_template
from medvlm.data.images import ImageTransform
from medvlm.data.loader import SampleEncoder
from medvlm.data.pack_layout import PackedSample, draw_packs
from medvlm.data.page import figure_svg, write_figure
from medvlm.data.pictures import look, pieces, strip
from medvlm.data.plots import draw_stats, histograms, label_counts
from medvlm.data.schema import Image, Sample
from medvlm.data.shards import ShardReader, write_shards
from medvlm.data.statistics import collect
from medvlm.data.volumes import encode_volume
from medvlm.errors import UserError

CLIP = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
SCRIPT = "<script>alert('x')</script>"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def lit(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Black, and white in the box."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def sample(key: str, answer: str = "no", *, sizes: tuple = ((400, 300),), **values) -> Sample:
    record = {
        "key": key,
        "source": "demo",
        "license": "CC0-1.0",
        "split": "train",
        "images": [{"file": f"{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(sizes)],
        "messages": [
            {"role": "user", "content": "<image> " * len(sizes) + "is there an effusion"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "left?"},
            {"role": "assistant", "content": "yes"},
        ],
    }
    return Sample.model_validate({**record, **values})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def make_encoder(tokenizer, processor=None, **options) -> SampleEncoder:
    template = multimodal_template(tokenizer.chat_template)
    transform = ImageTransform(processor or CLIPImageProcessorPil(**CLIP))
    return SampleEncoder(ConversationEncoder(tokenizer, template, 9), transform, max_length=200, **options)


@pytest.fixture
def reader(tmp_path) -> ShardReader:
    """Good, two images and several bytes per letter, too long, no image, a report only, a volume."""
    grey, box = png(lit(400, 300, (50, 100, 150, 200))), [{"label": f"b{SCRIPT}", "xyxy": [50, 100, 150, 200]}]
    volume = {"file": "0.b2", "width": 6, "height": 5, "depth": 4}
    items = [
        (sample("good", boxes=box, labels={f"Edema{SCRIPT}": 1, "Mass": -1, "Nodule": None}), {"0.png": grey}),
        (sample("two", "épanchement 日本\nà droite", sizes=((400, 300), (30, 30))), {"0.png": grey, "1.png": grey}),
        (sample("long", "no " * 300), {"0.png": grey}),
        (sample("broken", "yes"), {"0.png": b"text"}),
        (sample("report", messages=[], report={"findings": f"Clear. {SCRIPT}"}), {"0.png": grey}),
        (sample("volume", images=[volume]), {"0.b2": encode_volume(np.zeros((4, 5, 6), np.int16))}),
    ]
    write_shards(items, tmp_path, "demo")
    return ShardReader(tmp_path)


class Page(HTMLParser):
    """Per article: the tokens as (supervised, is image), their text, and all other words; tags and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.articles: list[SimpleNamespace] = []
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag not in ("meta", "image", "polygon"):
            self.open.append(tag)
        if tag == "article":
            self.articles.append(SimpleNamespace(id=values["id"], tokens=[], text="", words=""))
        if tag in ("i", "mark") and "pre" in self.open:
            count = int(values.get("data-n", 1))
            self.articles[-1].tokens += [(tag == "mark", values.get("class") == "im")] * count

    def handle_endtag(self, tag):
        if tag not in ("meta", "image", "polygon"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.articles and "article" in self.open:
            name = "text" if "pre" in self.open else "words"
            setattr(self.articles[-1], name, getattr(self.articles[-1], name) + data)


def read_page(reader: ShardReader, encoder=None) -> Page:
    return Page(sheet_html([look(reader, n, encoder, 0) for n in range(len(reader))], f"title {SCRIPT}"))


@pytest.mark.parametrize("key", [0, 1])
def test_supervised_tokens_are_those_with_labels_and_all_text_is_there(reader, tokenizer, key):
    encoder = make_encoder(tokenizer)
    article = read_page(reader, encoder).articles[key]
    encoded = encoder(*reader.load(key), 0)
    assert [supervised for supervised, _ in article.tokens] == [label != IGNORE for label in encoded.labels]
    assert [image for _, image in article.tokens] == [i == encoder.conversation.image_id for i in encoded.ids]
    whole = tokenizer.decode(encoded.ids, clean_up_tokenization_spaces=False)
    assert article.text.replace("\u21b5\n", "\n") == whole.replace("<image>" * 9, "<image> x 9")
    images, supervised = article.text.count("<image> x 9") * 9, sum(label != IGNORE for label in encoded.labels)
    assert f"{len(encoded.ids)} tokens:\n{images} image, {supervised} supervised" in article.words


def test_spaces_of_a_sentencepiece_tokenizer_stay():
    words = {w: n for n, w in enumerate(["<unk>", "<image>", "\u2581a", "\u2581clear", "\u2581lung", "."])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    found = pieces(SimpleNamespace(tokenizer=fast, image_id=1, image_tokens=2), [2, 3, 4, 5, 1, 1, 1, 1], [-100] * 8)
    assert [p.text for p in found] == ["a", " clear", " lung", ".", "<image>", "<image>"]


def test_a_quarantined_sample_shows_its_reason_and_what_is_stored(reader, tokenizer):
    good, _, long, broken, report, volume = read_page(reader, make_encoder(tokenizer)).articles
    assert "quarantined" not in good.words
    assert "tokens exceed data.max_length=200" in long.words and "no no no" in long.words and not long.tokens
    assert "quarantined: image 0: image cannot be decoded (not a known image format)" in broken.words
    assert "quarantined: no assistant turn to learn from" in report.words and "Clear." in report.words
    assert "quarantined: holds a volume" in volume.words and "6x5x4" in volume.words


def test_images_with_labels_alone_are_shown_and_quarantined(tokenizer, tmp_path):
    grey = png(lit(400, 300, (50, 100, 150, 200)))
    write_shards([(sample("image", messages=[], labels={"Edema": 1}), {"0.png": grey})], tmp_path, "demo")
    card = look(ShardReader(tmp_path), 0, make_encoder(tokenizer), 0)
    assert card.reason == "no assistant turn to learn from"
    assert (card.labels, card.turns, len(card.pictures)) == ({"Edema": 1}, [], 1)


def test_a_damaged_shard_gives_a_card_with_the_reason(reader, tokenizer):
    row = reader.row(0)
    with reader.tars[0].open("r+b") as file:
        for offset in row.offsets:
            file.seek(offset)
            file.write(b"\xff")
    card = look(ShardReader(reader.tars), 0, make_encoder(tokenizer))
    assert "checksum" in card.reason and card.key == "good" and not card.pictures


@pytest.mark.parametrize("seen", [True, False])
def test_everything_is_escaped_and_nothing_comes_from_elsewhere(reader, tokenizer, seen):
    page = read_page(reader, make_encoder(tokenizer) if seen else None)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "b<script>"}
    links = [v for _, values in page.tags for name, v in values.items() if name in ("href", "src", "xlink:href")]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert SCRIPT in page.articles[0].words and SCRIPT in page.articles[4].words
    assert page.open == []


def polygon(reader, encoder) -> list[list[float]]:
    return np.round(look(reader, 0, encoder, 0).pictures[0].boxes[0][1], 6).tolist()


def test_boxes_go_through_resize_crop_and_padding(reader, tokenizer):
    # 400x300 -> 40x30 -> the middle 30: a tenth, less 5
    assert polygon(reader, make_encoder(tokenizer)) == [[0, 10], [10, 10], [10, 20], [0, 20]]
    # 400x300 -> 40x30, whole
    squeezed = SiglipImageProcessorPil(size={"height": 30, "width": 40})
    assert polygon(reader, make_encoder(tokenizer, squeezed)) == [[5, 10], [15, 10], [15, 20], [5, 20]]
    # 400x300 -> 400x400 with 50 rows above -> 30x30
    padded = CLIPImageProcessorPil(**CLIP)
    padded.do_pad, padded.pad_to_square = True, None
    expected = [[3.75, 11.25], [11.25, 11.25], [11.25, 18.75], [3.75, 18.75]]
    assert polygon(reader, make_encoder(tokenizer, padded)) == expected
    # as stored
    assert polygon(reader, None) == [[50, 100], [150, 100], [150, 200], [50, 200]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_boxes_follow_the_augmented_pixels(reader, tokenizer, seed):
    augment = Augment(
        rotate=25, translate=0.1, scale=0.1, crop=0.8, horizontal_flip=0.5, contrast=0.2, brightness=0.1, noise=4
    )
    side = {"height": 300, "width": 400}
    encoder = make_encoder(tokenizer, SiglipImageProcessorPil(size=side), augment=augment, seed=seed)
    picture = look(reader, 0, encoder, epoch=3).pictures[0]
    mask = PILImage.new("1", (400, 300))
    ImageDraw.Draw(mask).polygon([tuple(p - 0.5) for p in picture.boxes[0][1]], fill=1)
    inside, bright = np.asarray(mask), picture.pixels > 127
    assert bright.sum() > 3000
    assert (inside & bright).sum() / (inside | bright).sum() > 0.96


def test_the_picture_is_what_the_transform_gives(reader, tokenizer):
    encoder = make_encoder(tokenizer)
    encoded = encoder(*reader.load(0), 0)
    assert np.array_equal(look(reader, 0, encoder, 0).pictures[0].pixels, encoded.images[0][0].numpy())


def test_a_volume_is_a_strip_of_slices_from_the_first_to_the_last():
    volume = np.repeat(np.arange(0, 200, 10, dtype=np.uint8), 6 * 5).reshape(1, 20, 5, 6)
    image = Image(file="0.b2", width=6, height=5, depth=20, windows=[(40, 400)])
    found = strip(encode_volume(volume), image)
    assert found.shape == (5, 6 * 8)
    assert found[0, ::6].tolist() == [10 * z for z in (0, 3, 5, 8, 11, 14, 16, 19)]
    hu = np.linspace(-1000, 1000, 8 * 30).astype(np.int16).reshape(8, 5, 6)
    found = strip(encode_volume(hu), Image(file="0.b2", width=6, height=5, depth=8))
    assert found.dtype == np.uint8 and found[0, 0] == 0 and found[-1, -1] == 255
    colour = np.stack([np.full((2, 5, 6), v, np.uint8) for v in (10, 20, 30)])
    windows = [(1, 2), (3, 4), (5, 6)]
    image = Image(file="0.b2", width=6, height=5, depth=2, windows=windows)
    assert strip(encode_volume(colour), image)[0, 0].tolist() == [10, 20, 30]


def test_contact_sheet_writes_html_and_png(reader, tokenizer, tmp_path):
    encoder = make_encoder(tokenizer)
    cards = contact_sheet(reader, tmp_path / "a.html", "demo", start="two", count=2, encoder=encoder)
    assert [card.key for card in cards] == ["two", "long"]
    assert "<!doctype html>" in (tmp_path / "a.html").read_text()
    contact_sheet(reader, tmp_path / "a.png", "demo", encoder=encoder)
    with PILImage.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1500 and (pixels == (0xB7, 0xF0, 0xCF)).all(-1).sum() > 1000  # supervised
    assert (pixels == (0xFF, 0xDA, 0xDA)).all(-1).sum() > 1000  # quarantined
    with pytest.raises(UserError, match=r"the ending must be one of \.html, \.png"):
        contact_sheet(reader, tmp_path / "a.pdf", "demo")
    with pytest.raises(UserError, match="no such folder"):
        contact_sheet(reader, tmp_path / "none" / "a.html", "demo")
    with pytest.raises(UserError, match="no sample 'x'"):
        contact_sheet(reader, tmp_path / "b.html", "demo", start="x")


@pytest.fixture
def counted(tmp_path) -> tuple[list[dict], object]:
    """Two sources in two splits, of 40 samples; texts of 1 to 40 letters, 0 to 3 images, labels in turn."""
    for source, split in (("a", "train"), ("b", "train"), ("b", "test")):
        items = []
        for n in range(40 if split == "train" else 5):
            text = {"messages": [], "report": {"findings": "x" * (n + 1)}, "labels": {"Edema": n % 3 - 1}}
            record = sample(f"{n}", sizes=((20, 10 + n),) * (n % 4), source=source, split=split, **text)
            items.append((record, {f"{i}.png": b"" for i in range(3)}))
        write_shards(items, tmp_path / f"{source}-{split}", "x")
    paths = sorted(tmp_path.glob("?-*"))
    tokens = np.arange(85)
    found = collect(paths, tokens=tokens)
    return found.rows, found


def test_histogram_counts_are_those_of_stats(counted):
    rows, found = counted
    drawn = {h.title: h for h in histograms(found)}
    assert list(drawn) == ["characters of text per sample", "tokens per sample", "images per sample"]
    for row in rows:
        group = f"{row['source']} {row['split']}"
        characters = drawn["characters of text per sample"]
        assert characters.counts[group].sum() == drawn["tokens per sample"].counts[group].sum() == row["samples"]
        filled = np.flatnonzero(characters.counts[group])
        low, high = characters.edges[filled[0]], characters.edges[filled[-1] + 1]
        assert low <= row["characters"]["min"] and row["characters"]["max"] < high
        per_sample = drawn["images per sample"]
        assert (per_sample.counts[group] * np.array([int(n) for n in per_sample.names])).sum() == row["images"]
    summed = {split: [0, 0, 0] for split in ("train", "test")}
    for row in rows:
        for n, value in enumerate(("positive", "negative", "uncertain")):
            summed[row["split"]][n] += row["labels"]["Edema"][value]
    assert {split: list(labels["Edema"].values()) for split, labels in label_counts(found).items()} == summed
    assert summed["train"] == [26, 26, 28]


def test_many_groups_are_drawn_as_the_largest_and_the_rest(tmp_path):
    for n in range(12):
        items = [(sample(f"s{n}-{i}", source=f"source{n:02d}"), {"0.png": b""}) for i in range(n + 1)]
        write_shards(items, tmp_path / f"{n}", "x")
    counts = histograms(collect(sorted(tmp_path.iterdir())))[0].counts
    assert list(counts) == [f"source{n:02d} train" for n in range(4, 12)] + ["4 others"]
    assert counts["4 others"].sum() == 1 + 2 + 3 + 4


def test_statistics_draw_as_png_and_as_svg_in_the_colour_of_the_page(counted, tmp_path):
    _, found = counted
    figure = draw_stats(found)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[-3:] == ["labels, test", "labels, train", f"stored size of images: {len_images(found)}"]
    svg = ElementTree.fromstring(figure_svg(figure))
    assert svg.tag.endswith("svg") and any("currentColor" in str(e.attrib) for e in svg.iter())
    assert write_figure(figure, tmp_path / "s.html", "t").read_text().count("<svg") == 1
    assert write_figure(figure, tmp_path / "s.png", "t").read_bytes()[:4] == b"\x89PNG"


def len_images(found) -> int:
    return sum(row["images"] for row in found.rows)


def test_a_bar_per_pack_has_the_lengths_of_its_samples():
    packs = [[PackedSample("a", 100, 576, 50), PackedSample("b", 300, 0, 200)], [PackedSample("too-long", 1200, 0)]]
    axes = draw_packs(packs, 1000, first=7).axes[0]
    bars = [(p.get_y() + p.get_height() / 2, p.get_x(), p.get_width(), p.get_hatch()) for p in axes.patches]
    first = [(x, width, hatch) for y, x, width, hatch in bars if abs(y) < 0.01 and width]
    assert first == [(0, 576, "////"), (576, 100, None), (676, 300, None)]
    supervised = [(x, width) for y, x, width, _ in bars if 0.4 < y < 0.6 and width]
    assert supervised == [(626, 50), (776, 200)]
    words = [text.get_text() for text in axes.texts]
    assert "97.6%, 2 samples, 26% supervised" in words and "120.0%, 1 sample, 200 too many" in words
    assert axes.get_title() == "2 packs of 1000 tokens, 108.8% full"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["pack 7", "pack 8"]
    assert figure_svg(draw_packs(packs, 1000)) == figure_svg(draw_packs(packs, 1000))
    with pytest.raises(UserError, match="none to draw"):
        draw_packs([], 1000)


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pictures need matplotlib: pip install 'medvlm"):
        draw_packs([[PackedSample("a", 1, 0)]], 10)
