"""One source of an archive -> a shard's member: kept, stripped, shrunk, or refused with a reason."""

import io
import json

import numpy as np
import pytest
from conftest import DATA
from medical_files import make_dicom, refused, to_bytes, write_series
from PIL import Image, ImageFile, PngImagePlugin

from data_prep.items import Source
from data_prep.pixels import PixelOptions, encode_source, strip_jpeg
from medvlm.data.volumes import decode_volume, window
from medvlm.inference.images import decode_image

ORIGINALS = sorted((DATA / "cxr_covid_collection" / "originals").glob("*.*")) if DATA.is_dir() else []
MARK = b"DOE^JOHN"


def radiograph(width=60, height=80, mode="L", seed=0):
    """Smooth with a little noise, as JPEG likes it."""
    y, x = np.mgrid[:height, :width]
    grey = 120 + 80 * np.sin(x / 17) * np.cos(y / 23) + np.random.default_rng(seed).normal(0, 2, (height, width))
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image if mode == "L" else Image.merge("RGB", (image, image.rotate(180), image.transpose(Image.ROTATE_180)))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode(tmp_path, data, options=None, kind="image", **source_options):
    (tmp_path / "file").write_bytes(data)
    source = Source("file", kind, image_id="i1", view="PA", metadata={"site": 1}, options=source_options)
    image, stored = encode_source(source, tmp_path, 0, options or PixelOptions())
    assert (image.image_id, image.view, image.metadata["site"]) == ("i1", "PA", 1)
    return image, stored


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def marked_exif(orientation=1):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, MARK.decode()
    return exif


def marked_jpeg(image, **options):
    """A JPEG with the mark in EXIF, a comment, ICC, XMP, a JFIF thumbnail, between its scans, and after its end."""
    options = {"quality": 90, "exif": marked_exif(), "comment": MARK, "icc_profile": MARK, "xmp": MARK, **options}
    data = encoded(image, **options)
    jfif = data.index(b"JFIF\0")
    thumbnail = MARK + b"\0"  # 9 bytes: 1 x 3 pixels
    data = (
        data[: jfif - 2]
        + (16 + 9).to_bytes(2, "big")
        + data[jfif : jfif + 12]
        + b"\1\3"
        + thumbnail
        + data[jfif + 14 :]
    )
    last_scan = data.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + (2 + len(MARK)).to_bytes(2, "big") + MARK
    return data[:last_scan] + b"\xff" + comment + data[last_scan:] + MARK


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_jpeg_keeps_its_pixels_and_loses_its_metadata(tmp_path, mode, progressive, restarts):
    data = marked_jpeg(radiograph(mode=mode), progressive=progressive, restart_marker_blocks=restarts)
    assert data.count(MARK) == 7
    image, stored = encode(tmp_path, data)
    assert image.file == "0.jpg" and MARK not in stored and len(stored) < len(data)
    np.testing.assert_array_equal(pixels(stored), pixels(data))
    assert (image.width, image.height, image.original_size) == (60, 80, (60, 80))
    assert strip_jpeg(stored) == stored


def test_adobes_segment_stays_for_it_names_the_colours(tmp_path):
    data = bytearray(encoded(radiograph(mode="RGB"), quality=95, keep_rgb=True))
    assert b"Adobe" in data
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 10 : frame + 19 : 3] = data[scan + 5 : scan + 11 : 2] = b"\1\2\3"  # ids that do not spell R, G, B
    expected = np.asarray(radiograph(mode="RGB")).astype(int)
    assert np.abs(pixels(bytes(data)) - expected).mean() < 2
    assert np.abs(pixels(encode(tmp_path, bytes(data))[1]) - expected).mean() < 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_png_keeps_its_pixels_and_loses_its_metadata(tmp_path, mode):
    text = PngImagePlugin.PngInfo()
    for add in (text.add_text, text.add_itxt, lambda k, v: text.add_text(k, v, zip=True)):
        add("Patient", MARK.decode())
    data = (
        encoded(radiograph(mode=mode), "PNG", pnginfo=text, exif=marked_exif(), icc_profile=MARK, dpi=(72, 72)) + MARK
    )
    image, stored = encode(tmp_path, data)
    assert image.file == "0.png" and MARK not in stored
    assert stored[:8] == data[:8] and {c for c in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"iCCP") if c in stored} == set()
    np.testing.assert_array_equal(pixels(stored), pixels(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_large_pictures_are_shrunk_antialiased_and_small_ones_never_enlarged(tmp_path, kind, mode):
    image = radiograph(300, 400, mode)
    record, stored = encode(tmp_path, encoded(image, kind), PixelOptions(short_side=100, quality=90))
    assert (record.file, record.width, record.height, record.original_size) == ("0.jpg", 100, 133, (300, 400))
    assert Image.open(io.BytesIO(stored)).mode == mode
    reference = np.asarray(image.resize((100, 133), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(pixels(stored) - reference).mean() < 2
    assert encode(tmp_path, encoded(image, kind), PixelOptions(short_side=300))[0].width == 300
    assert encode(tmp_path, encoded(image, kind), PixelOptions(short_side=1000))[0].width == 300


def test_shrinking_removes_what_would_alias(tmp_path):
    stripes = np.zeros((200, 200), np.uint8)
    stripes[:, ::2] = 255
    stored = pixels(encode(tmp_path, encoded(Image.fromarray(stripes), "PNG"), PixelOptions(short_side=80))[1])
    assert np.ptp(stored[8:-8, 8:-8]) < 20  # even grey; every other pixel alone would leave bands


def test_grey_stored_as_colour_becomes_one_channel(tmp_path):
    _, stored = encode(tmp_path, encoded(radiograph(300, 400).convert("RGB"), "PNG"), PixelOptions(short_side=100))
    assert Image.open(io.BytesIO(stored)).mode == "L"


def test_alpha_palette_cmyk_and_bilevel(tmp_path):
    clear = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    clear.paste((0, 0, 200, 255), (0, 0, 8, 4))
    shown = pixels(encode(tmp_path, encoded(clear, "PNG"))[1]).astype(int)
    assert np.abs(shown[1, 4] - (0, 0, 200)).max() < 12 and shown[6, 4].min() > 250  # transparent lies on white
    opaque = radiograph(mode="RGB").convert("RGBA")
    assert (
        np.abs(pixels(encode(tmp_path, encoded(opaque, "PNG"))[1]) - np.asarray(opaque)[..., :3].astype(int)).mean() < 3
    )
    grey_alpha = radiograph().convert("LA")
    assert Image.open(io.BytesIO(encode(tmp_path, encoded(grey_alpha, "PNG"))[1])).mode == "L"
    for image, kind in (
        (radiograph(mode="RGB").quantize(64), "PNG"),
        (radiograph(mode="RGB").convert("CMYK"), "JPEG"),
        (radiograph().convert("1"), "PNG"),
    ):
        _, stored = encode(tmp_path, encoded(image, kind))
        reference = image.convert("L" if image.mode == "1" else "RGB")
        assert Image.open(io.BytesIO(stored)).mode == reference.mode
        assert np.abs(pixels(stored).astype(int) - np.asarray(reference)).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(tmp_path, kind):
    data = encoded(radiograph(), kind, exif=marked_exif(6))  # turn clockwise to view
    image, stored = encode(tmp_path, data)
    assert (image.width, image.height) == (80, 60) and MARK not in stored
    assert Image.open(io.BytesIO(stored)).getexif().get(0x0112) is None
    expected = np.rot90(np.asarray(Image.open(io.BytesIO(data))), -1).astype(int)
    assert np.abs(pixels(stored) - expected).mean() < 3
    # answering questions shows the same picture
    assert np.abs(np.asarray(decode_image(data, "a")).astype(int) - pixels(stored)).mean() < 3


def test_16_bit_grey(tmp_path):
    ramp = np.linspace(100, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = encoded(Image.fromarray(ramp), "PNG")
    image, stored = encode(tmp_path, data, PixelOptions(quality=95))
    expected = np.rint((ramp - 100.0) / 3995 * 255)
    assert image.file == "0.jpg" and np.abs(pixels(stored) - expected).max() <= 3
    image, stored = encode(tmp_path, data, PixelOptions(keep_16_bit=True))
    assert image.file == "0.png" and pixels(stored).dtype == np.uint16
    np.testing.assert_array_equal(pixels(stored), ramp)
    np.testing.assert_array_equal(pixels(encode(tmp_path, data, keep_16_bit=True)[1]), ramp)  # the source's option
    tiff = encoded(Image.fromarray(ramp), "TIFF")
    np.testing.assert_array_equal(pixels(encode(tmp_path, tiff, PixelOptions(keep_16_bit=True))[1]), ramp)
    image, stored = encode(tmp_path, data, PixelOptions(keep_16_bit=True, short_side=32))
    assert image.width == 32 and pixels(stored).dtype == np.uint16
    averaged = ramp.reshape(32, 2, 32, 2).mean((1, 3))
    assert np.abs(pixels(stored)[4:-4, 4:-4] - averaged[4:-4, 4:-4]).max() < 3


@pytest.mark.parametrize("path", ORIGINALS[:6], ids=lambda p: p.name[:20])
def test_real_originals(path):
    image, stored = encode_source(Source(path.name), path.parent, 3, PixelOptions(short_side=224))
    original = decode_image(path.read_bytes(), "original")
    shown = Image.open(io.BytesIO(stored))
    assert image.file.startswith("3.") and image.original_size == original.size
    assert min(shown.size) == min(224, *original.size) and shown.size == (image.width, image.height)
    reference = original.convert("RGB").resize(shown.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - np.asarray(reference)).mean() < 2
    assert encode_source(Source(path.name), path.parent, 3, PixelOptions(short_side=224)) == (image, stored)


def bomb():
    """A PNG that claims 30000 x 30000 pixels in a few bytes."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    import zlib

    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


JPEG = encoded(radiograph(300, 400), quality=95)
PNG = encoded(radiograph(300, 400), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text that calls itself jpg", "unreadable image: not a known image format"),
        (JPEG[: len(JPEG) // 2], "unreadable image: "),
        (PNG[: len(PNG) // 2], "unreadable image: "),
        (PNG[:200] + bytes(50) + PNG[250:], "unreadable image: "),
        (bomb(), "too large an image: "),
        (encoded(radiograph(), "TIFF", save_all=True, append_images=[radiograph()]), "several pictures in one file: 2"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "unreadable image: not a known image format"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "damaged PNG", "bomb", "two pages", "PostScript"],
)
def test_bad_files_are_refused_with_a_reason_that_can_be_counted(tmp_path, monkeypatch, data, reason):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # whoever sets it
    with refused(reason) as caught:
        encode(tmp_path, data)
    assert str(tmp_path) not in str(caught.value)


def test_wrong_sources_are_refused(tmp_path):
    with refused("file not found"):
        encode_source(Source("absent.jpg"), tmp_path, 0, PixelOptions())
    with refused("unknown option: slope for kind image"):
        encode(tmp_path, JPEG, slope=2)
    for wrong in ({"quality": 0}, {"quality": 96}, {"short_side": 0}):
        with refused(next(iter(wrong))):
            PixelOptions(**wrong)


def test_a_page_of_several_is_chosen(tmp_path):
    pages = [radiograph(seed=s) for s in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.abs(pixels(encode(tmp_path, data, frame=2)[1]).astype(int) - np.asarray(pages[2])).mean() < 2


def test_dicom_becomes_a_shrunk_jpeg_with_its_spacing(tmp_path):
    grey = np.asarray(radiograph(300, 400)).astype(np.uint16) * 16
    elements = {"WindowCenter": 2048, "WindowWidth": 4096, "PixelSpacing": [0.2, 0.1], "ViewPosition": "AP"}
    data = to_bytes(make_dicom(grey, bits=12, Modality="CR", **elements))
    image, stored = encode(tmp_path, data, PixelOptions(short_side=100, windows=((0, 1),)), "dicom")
    assert (image.file, image.width, image.height, image.original_size) == ("0.jpg", 100, 133, (300, 400))
    assert image.spacing == pytest.approx((0.1 * 300 / 100, 0.2 * 400 / 133))
    assert image.windows == [(2048, 4096)]  # windows in HU are for CT alone
    reference = radiograph(300, 400).resize((100, 133), Image.Resampling.LANCZOS)
    assert np.abs(pixels(stored).astype(int) - np.asarray(reference)).mean() < 2
    image, stored = encode(tmp_path, data, PixelOptions(keep_16_bit=True), "dicom")
    assert image.file == "0.png" and image.windows is None
    np.testing.assert_array_equal(pixels(stored), grey)
    source = Source("file", "dicom")
    assert encode_source(source, tmp_path, 0, PixelOptions())[0].view == "AP"


def test_windows_reach_ct_slices_and_frames_are_chosen(tmp_path):
    stack = np.stack([np.full((16, 16), v, np.int16) for v in (-100, 40, 140)])
    data = to_bytes(make_dicom(stack, NumberOfFrames=3, Modality="CT"))
    options = PixelOptions(windows=((40, 400),))
    for frame, expected in enumerate((38, 128, 191)):  # (x + 160) / 400 * 255
        image, stored = encode(tmp_path, data, options, "dicom", frame=frame)
        assert abs(int(pixels(stored)[8, 8]) - expected) <= 1
        assert image.windows == [(40, 400)] and image.metadata["frames"] == 3 and image.metadata["frame"] == frame


def test_a_series_becomes_a_volume(tmp_path):
    stack = np.random.default_rng(0).integers(0, 3000, (6, 9, 8)).astype(np.int16)
    write_series(tmp_path / "series", stack, PatientName="DOE^JOHN", PatientID="4711", StudyDescription="FOR DOE^JOHN")
    source = Source("series", "series", image_id="s")
    image, stored = encode_source(source, tmp_path, 1, PixelOptions())
    assert (image.file, image.width, image.height, image.depth) == ("1.b2", 8, 9, 6)
    assert image.original_size == (8, 9, 6) and image.spacing == (0.5, 0.75, 2.5) and image.windows is None
    np.testing.assert_array_equal(decode_volume(stored), stack - 1024)
    assert MARK not in image.model_dump_json().encode() + stored and "4711" not in image.model_dump_json()
    windows = ((40, 400), (-600, 1500))
    image, stored = encode_source(source, tmp_path, 1, PixelOptions(windows=windows))
    assert image.windows == list(windows)
    np.testing.assert_array_equal(decode_volume(stored), window(stack - 1024, windows))
    write_series(tmp_path / "mr", stack, Modality="MR", RescaleIntercept=0)
    image, stored = encode_source(Source("mr", "series"), tmp_path, 0, PixelOptions(windows=windows))
    assert image.windows is None and decode_volume(stored).dtype == np.int16  # HU windows say nothing of MR


def test_a_nifti_becomes_a_volume(test_data):
    path = test_data / "nifti" / "totalseg_example_ct_sm.nii.gz"
    plain, stored = encode_source(Source(str(path), "nifti"), test_data, 0, PixelOptions())
    assert (plain.width, plain.height, plain.depth, plain.spacing) == (122, 101, 30, (3.0, 3.0, 3.0))
    options = {"slope": 2, "intercept": -8, "windows": [[40, 400]]}
    image, windowed = encode_source(Source(str(path), "nifti", options=options), test_data, 0, PixelOptions())
    values = decode_volume(stored).astype(np.int16)
    np.testing.assert_array_equal(decode_volume(windowed), window(values * 2 - 8, [(40, 400)]))
    assert image.windows == [(40, 400)]
    json.loads(image.model_dump_json())
