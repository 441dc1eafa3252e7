"""Decoding, the processors' pixels, augmentation, and normalisation on the device."""

import io
import math
import pickle
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    LlavaImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from medvlm.data.augment import Augment
from medvlm.data.images import ImageTransform
from medvlm.errors import UserError
from medvlm.models.vision_language_model import VisionLanguageModel


def square(side: int) -> dict:
    return {"height": side, "width": side}


def processors(side: int) -> dict:
    return {
        "clip": CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square(side)),
        "siglip": SiglipImageProcessor(size=square(side)),
        "vit": ViTImageProcessor(size=square(side)),
        "dinov2": BitImageProcessor(size={"shortest_edge": side + side // 7}, crop_size=square(side)),
        "pad": LlavaImageProcessor(size=square(side), do_center_crop=False, do_pad=True),
    }


KINDS = list(processors(32))


def reference(processor, image: Image.Image) -> np.ndarray:
    """uint8 [3, S, S] of transformers' own processor, from a full decode."""
    return processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(np.mean((a.astype(float) - b) ** 2))))


def radiograph(width: int, height: int, seed: int = 0, noise: float = 3.0) -> Image.Image:
    """Two dark lungs, a spine, ribs, and a sharp side marker, under the noise of a detector."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = x / width - 0.5, y / height - 0.5
    grey = 60 + 90 * np.exp(-3 * (u * u + v * v)) + 25 * np.exp(-((u / 0.06) ** 2))
    for side in (-0.2, 0.2):
        lung = np.exp(-((((u - side) / 0.13) ** 2 + ((v + 0.02) / 0.28) ** 2) ** 2))
        grey += lung * (8 * np.sin(60 * v + 14 * abs(u)) - 70)
    grey[height // 20 : height // 12, width // 20 : width // 12] = 230
    grey += np.random.default_rng(seed).normal(0, noise, grey.shape)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "jpeg", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "jpeg" else {}), **options)
    return buffer.getvalue()


def colour(width: int, height: int) -> Image.Image:
    return Image.merge("RGB", [radiograph(width, height, seed) for seed in range(3)])


@pytest.fixture(scope="module")
def xrays(test_data) -> dict[str, bytes]:
    folder = test_data / "cxr_covid_collection" / "originals"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def large() -> bytes:
    return encode(radiograph(2048, 2500))


@pytest.mark.parametrize("kind", KINDS)
def test_real_images_get_the_processors_pixels(xrays, kind):
    processor = processors(224)[kind]
    exact, fast = ImageTransform(processor, exact=True), ImageTransform(processor)
    for name, data in xrays.items():
        its = reference(processor, Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.array_equal(exact(data, name).expand(3, -1, -1), its), name
        if data[:2] != b"\xff\xd8":  # never reduced
            ours = fast(data, name).expand(3, -1, -1).numpy()
            # a padded image's sides are resized in another order, so that more values are rounded otherwise
            assert np.abs(ours - its).max() <= 2 and psnr(ours, its) > (55 if kind == "pad" else 65), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(97, 61), (50, 133), (64, 64), (20, 31)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_odd_sizes_get_the_processors_pixels(kind, size, mode):
    processor = processors(56)[kind]
    image = Image.effect_noise(size, 80) if mode == "L" else Image.merge("RGB", [Image.effect_noise(size, 80)] * 3)
    ours = ImageTransform(processor, exact=True)(encode(image, "png"), "x").expand(3, -1, -1)
    assert np.array_equal(ours, reference(processor, image.convert("RGB")))


@pytest.mark.parametrize("size", [(97, 61), (50, 133), (31, 20), (200, 199), (64, 65), (300, 9), (7, 150), (640, 480)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_padding_added_after_the_resize_is_as_if_added_before(size, mode):
    """Larger and smaller than the target, with padding from half a pixel of the result to nearly all of it."""
    image = radiograph(*size) if mode == "L" else colour(*size)
    for processor in (
        processors(56)["pad"],
        LlavaImageProcessor(size=square(60), resample=2, do_center_crop=False, do_pad=True),
    ):
        ours = ImageTransform(processor)(encode(image, "png"), "x").expand(3, -1, -1).numpy()
        assert np.abs(ours - reference(processor, image.convert("RGB")).astype(int)).max() <= 2


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_every_filter_of_pillow_is_followed(resample):
    processor = SiglipImageProcessor(size=square(48), resample=resample)
    image = radiograph(300, 250)
    its = reference(processor, image.convert("RGB")).astype(int)
    assert np.array_equal(ImageTransform(processor, exact=True)(encode(image, "png"), "x").expand(3, -1, -1), its)
    assert np.abs(ImageTransform(processor)(encode(image, "png"), "x").numpy() - its).max() <= 1
    reduced = ImageTransform(processor)(encode(image), "x").expand(3, -1, -1).numpy()
    assert psnr(reduced, reference(processor, Image.open(io.BytesIO(encode(image))).convert("RGB"))) >= 50


@pytest.mark.parametrize("size", [(301, 257), (257, 301), (300, 300)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_padding_keeps_its_place_and_colour_when_the_decode_is_reduced(size, mode):
    processor = processors(56)["pad"]
    data = encode(radiograph(*size) if mode == "L" else colour(*size))
    its = reference(processor, Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    ours = ImageTransform(processor)(data, "x").expand(3, -1, -1).numpy()
    assert psnr(ours, its) >= 50
    edges = (ours[:, :, :3], its[:, :, :3]) if size[0] < size[1] else (ours[:, :3], its[:, :3])
    assert size[0] == size[1] or np.abs(edges[0] - edges[1]).max() <= 1


@pytest.mark.parametrize(
    ("kind", "side"), [("clip", 336), ("siglip", 256), ("siglip", 384), ("pad", 224), ("vit", 448)]
)
def test_reduced_decoding_stays_above_52_db(xrays, large, kind, side):
    processor = processors(side)[kind]
    transform = ImageTransform(processor)
    jpegs = {n: d for n, d in xrays.items() if d[:2] == b"\xff\xd8" and len(d) > 150_000}
    assert len(jpegs) == 3
    for name, data in {**jpegs, "synthetic": large}.items():
        its = reference(processor, Image.open(io.BytesIO(data)).convert("RGB"))
        assert psnr(transform(data, name).expand(3, -1, -1).numpy(), its) >= 52, name


def test_large_jpegs_are_decoded_reduced_but_never_below_twice_the_target(large, monkeypatch):
    shapes = []
    decode = __import__("simplejpeg").decode_jpeg
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *a, **k: shapes.append((r := decode(*a, **k)).shape) or r)
    for side in (224, 336, 448, 672):
        ImageTransform(SiglipImageProcessor(size=square(side)))(large, "x")
    assert shapes == [(625, 512, 1), (938, 768, 1), (1250, 1024, 1), (1875, 1536, 1)]


def test_grey_files_stay_one_channel_and_colour_three():
    for kind in ("jpeg", "png"):
        transform = ImageTransform(processors(32)["clip"])
        assert transform(encode(radiograph(90, 70), kind), "x").shape == (1, 32, 32)
        assert transform(encode(colour(90, 70), kind), "x").shape == (3, 32, 32)
    # CLIP's mean colour is no grey, so its padding needs three channels; SigLIP's does not
    assert ImageTransform(processors(32)["pad"])(encode(radiograph(90, 70)), "x").shape == (3, 32, 32)
    grey = LlavaImageProcessor(size=square(32), do_center_crop=False, do_pad=True, image_mean=[0.5] * 3)
    assert ImageTransform(grey)(encode(radiograph(90, 70)), "x").shape == (1, 32, 32)


def test_palette_alpha_cmyk_bilevel_and_progressive_files_decode():
    transform = ImageTransform(processors(64)["siglip"])
    rgb, grey = colour(64, 64), radiograph(64, 64)
    palette = rgb.quantize(256)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(transform(encode(palette, "png"), "x"), expected)
    clear = rgb.copy()
    clear.putalpha(0)
    assert transform(encode(clear, "png"), "x").unique().tolist() == [255], "transparent is the white of the page"
    assert np.array_equal(transform(encode(grey.convert("1"), "png"), "x")[0], np.asarray(grey.convert("1")) * 255)
    cmyk = encode(rgb.convert("CMYK"))
    its = np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(transform(cmyk, "x"), its)
    progressive = encode(grey, progressive=True)
    assert np.array_equal(transform(progressive, "x")[0], np.asarray(Image.open(io.BytesIO(progressive))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_loads_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(radiograph(96, 64), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    processor = processors(48)["clip"]
    ours = ImageTransform(processor, exact=True)(data, "x").expand(3, -1, -1)
    assert np.array_equal(ours, reference(processor, upright.convert("RGB")))


DAMAGED = {
    "truncated": lambda: encode(radiograph(300, 300))[:-2000],
    "without its end": lambda: encode(radiograph(300, 300))[:-2],
    "truncated progressive": lambda: encode(radiograph(300, 300), progressive=True)[:9000],
    "overwritten": lambda: (d := encode(radiograph(300, 300)))[:9000] + bytes(range(256)) * 4 + d[10024:],
    "header only": lambda: encode(radiograph(300, 300))[:200],
    "truncated png": lambda: encode(radiograph(300, 300), "png")[:9000],
}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("side", [32, 300])
def test_damaged_files_are_refused_at_any_scale(how, side):
    with pytest.raises(UserError, match=r"^shard:key\.0\.jpg: image cannot be decoded \(.+\)$"):
        ImageTransform(SiglipImageProcessor(size=square(side)))(DAMAGED[how](), "shard:key.0.jpg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"Findings: no effusion.", "not a known image format"),
        (b"", "not a known image format"),
        (b"\xff\xd8 text after two bytes", "JPEG"),
        (bytes(128) + b"DICM" + bytes(100), "DICOM file; prepare it"),
        (encode(Image.fromarray(np.full((40, 40), 4095, np.uint16)), "png"), "16 bits per value; prepare it"),
        (cv2.imencode(".png", np.full((40, 40, 3), 4095, np.uint16))[1].tobytes(), "16 bits per value; prepare it"),
        (encode(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "tiff"), "more than 8 bits"),
    ],
    ids=["text", "empty", "text with a JPEG's first bytes", "dicom", "16-bit grey", "16-bit colour", "float"],
)
def test_what_is_no_8_bit_image_is_refused_with_the_reason(data, reason):
    with pytest.raises(UserError, match=f"^image 0: image cannot be decoded .*{reason}"):
        ImageTransform(processors(32)["clip"])(data, "image 0")


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (CLIPImageProcessor(do_normalize=False), "do_normalize is off"),
        (ViTImageProcessor(do_resize=False), "do_resize is off"),
        (ViTImageProcessor(rescale_factor=1 / 127.5), "rescale_factor must be 1/255"),
        (CLIPImageProcessor(size={"shortest_edge": 200}), "which is smaller"),
        (CLIPImageProcessor(size={"shortest_edge": 200, "longest_edge": 300}), "is not supported"),
        (SiglipImageProcessor(do_pad=True, pad_size=square(300)), "LlavaImageProcessor only"),
    ],
)
def test_processors_that_training_would_not_follow_are_refused(processor, reason):
    with pytest.raises(UserError, match=reason):
        ImageTransform(processor)


def test_the_transform_pickles_and_repeats():
    transform = ImageTransform(processors(56)["pad"])
    data = encode(colour(300, 200))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(data, "x"), transform(data, "x"))


@pytest.mark.parametrize("mean", [[0.5] * 3, [0.48, 0.45, 0.40]])
def test_grey_images_are_expanded_and_normalised_in_the_model(mean):
    class Tower(nn.Module):
        def forward(self, pixels, output_hidden_states):
            self.seen = pixels
            return type("Output", (), {"hidden_states": [pixels.flatten(2).mT]})

    class Language(nn.Module):
        def get_output_embeddings(self):
            return nn.Linear(4, 4)

        def get_decoder(self):
            return self

    tower = Tower()
    model = VisionLanguageModel(
        *(tower, nn.Linear(3, 4), Language()),
        **dict(image_token_id=0, image_size=8, feature_layer=0, select_strategy="full", mean=mean, std=[0.2, 0.3, 0.4]),
    )
    grey = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    features = model.image_features(grey)
    its = CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=mean, image_std=[0.2, 0.3, 0.4])
    pictures = [Image.fromarray(g[0].numpy()).convert("RGB") for g in grey]
    assert torch.allclose(tower.seen, its(pictures, return_tensors="pt")["pixel_values"], atol=1e-5)
    assert torch.equal(model.image_features(grey.expand(-1, 3, -1, -1)), features)
    assert features.shape == (5, 64, 4)


EVERYTHING = Augment(15, 0.1, 0.1, 0.7, 0.5, 0.1, 0.2, 0.2, 1.0, 4.0)


def picture(channels: int = 1, side: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(radiograph(side, side)).copy()).expand(channels, -1, -1)


def test_augmentation_is_off_by_default():
    image = picture()
    assert Augment()(image, "key", 0, 0, 0) is image and not Augment().active and EVERYTHING.active


def test_augmentation_is_a_pure_function_of_key_number_epoch_and_seed():
    image, before = picture(), picture().clone()
    first = EVERYTHING(image, "key", 0, 0, 0)
    np.random.seed(1), random.seed(1), torch.manual_seed(1)
    assert torch.equal(EVERYTHING(image, "key", 0, 0, 0), first) and torch.equal(image, before)
    assert first.dtype == torch.uint8 and first.shape == image.shape and first.is_contiguous()
    others = [EVERYTHING(image, *v) for v in [("other", 0, 0, 0), ("key", 1, 0, 0), ("key", 0, 1, 0), ("key", 0, 0, 1)]]
    assert not any(torch.equal(other, first) for other in others)


def test_augmentation_treats_grey_and_its_three_channels_alike():
    assert torch.equal(EVERYTHING(picture(3), "k", 0, 0, 0), EVERYTHING(picture(), "k", 0, 0, 0).expand(3, -1, -1))


def half(epoch: int, **options: float) -> torch.Tensor:
    """An image that is bright on its left, augmented."""
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[..., :20] = 200
    return Augment(**options)(image, "k", 0, epoch, 0).float()[0]


def test_sides_are_kept_unless_mirroring_is_asked_for():
    options = {"rotate": 30, "translate": 0.1, "scale": 0.2, "crop": 0.6, "contrast": 0.3, "blur": 1, "noise": 5}
    for epoch in range(60):
        assert half(epoch, **options)[:, :32].mean() > half(epoch, **options)[:, 32:].mean()
    mirrored = [bool((half(e, horizontal_flip=0.3)[:, -20:] == 200).all()) for e in range(300)]
    assert 60 < sum(mirrored) < 120
    assert torch.equal(half(0, horizontal_flip=1.0), half(0).flip(1))


def test_geometry_stays_within_its_bounds():
    dot = torch.zeros(1, 101, 101, dtype=torch.uint8)
    dot[0, 48:53, 78:83] = 255  # 30 to the right of the centre

    def place(**options) -> tuple[float, float]:
        image = Augment(**options)(dot, "k", 0, place.epoch, 0)[0].double()
        place.epoch += 1
        y, x = torch.meshgrid(torch.arange(101.0), torch.arange(101.0), indexing="ij")
        return float((image * x).sum() / image.sum() - 50), float((image * y).sum() / image.sum() - 50)

    place.epoch = 0
    turned = np.array([place(rotate=20) for _ in range(200)])
    angles = np.degrees(np.arctan2(turned[:, 1], turned[:, 0]))
    assert 18 < angles.max() <= 20.2 and -20.2 <= angles.min() < -18
    assert np.allclose(np.hypot(*turned.T), 30, atol=0.3)
    moved = np.array([place(translate=0.1) for _ in range(200)]) - [30, 0]
    assert 9 < np.abs(moved).max() <= 10.2 and np.abs(moved.mean(0)).max() < 1.5
    zoomed = np.array([place(scale=0.2) for _ in range(200)])[:, 0] / 30
    assert 0.79 < zoomed.min() < 0.82 and 1.18 < zoomed.max() < 1.21


def test_grey_values_follow_the_formulas():
    image = picture().clamp(60, 190)  # so that nothing saturates
    x = image.double() / 255
    changes = [(Augment(brightness=0.2)(image, "k", 0, e, 0).double() / 255 - x) for e in range(50)]
    assert all(float(c.max() - c.min()) < 0.006 for c in changes)
    assert 0.17 < max(float(c.mean()) for c in changes) <= 0.2 + 1e-2
    for epoch in range(20):
        y = Augment(contrast=0.3)(image, "k", 0, epoch, 0).double() / 255
        assert abs(float(y.mean() - x.mean())) < 3e-3 and 0.69 < float(y.std() / x.std()) < 1.31
        z = Augment(gamma=0.5)(image, "k", 0, epoch, 0).double() / 255
        power = float(z[0, 5, 40].log() / x[0, 5, 40].log())
        assert 1 / 1.55 < power < 1.55 and torch.allclose(z, x**power, atol=0.03)
    dark = image.clamp(max=180)  # times 1.4 it is below 255
    lit = [Augment(gain=0.4)(dark, "k", 0, epoch, 0).double() for epoch in range(50)]
    factors = [float(w.mean() / dark.double().mean()) for w in lit]
    assert all(torch.allclose(w, f * dark.double(), atol=1.5) for w, f in zip(lit, factors, strict=True))
    assert 0.6 < min(factors) < 0.65 and 1.3 < max(factors) < 1.4
    noise = [(Augment(noise=6)(image, "k", 0, e, 0).double() - image).std() for e in range(100)]
    assert 5 < max(noise) < 6.6 and min(noise) < 1
