"""DICOM -> picture, values and the allow-list of its header; references: PS3.3 by hand, pydicom's other decoders."""

import csv
import json

import numpy as np
import pydicom
import pytest
from conftest import DATA
from medical_files import make_dicom, refused, sequence, to_bytes
from pydicom.datadict import DicomDictionary
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import ExplicitVRBigEndian, JPEGLSLossless, RLELossless

from data_prep.items import Source
from data_prep.pixels import PixelOptions, encode_source
from medvlm.data.dicom import DECODERS, metadata, picture, read_dicom, stored_pixels
from medvlm.data.dicom_codes import CODES

INDEX = list(csv.DictReader((DATA / "dicom" / "INDEX.csv").open())) if DATA.is_dir() else []
RGB = "RGB"

# INDEX.csv tells what pydicom with pylibjpeg does. Where it refuses, so do we, for these reasons. JPEG-lossy.dcm is
# JPGExtended.dcm with one byte of a scan header damaged: gdcm decodes it with a warning, we check that byte.
REFUSED = {
    "JPEG-lossy.dcm": "unreadable DICOM: a JPEG scan header is damaged",
    "MR_truncated.dcm": "unreadable DICOM: The number of bytes of pixel data is less than expected",
    "no_meta.dcm": "unreadable DICOM: no DICOM prefix",
}


@pytest.mark.parametrize("entry", INDEX, ids=lambda e: e["file"])
def test_every_real_file_decodes_as_the_index_says_or_is_refused(entry):
    data = (DATA / "dicom" / entry["file"]).read_bytes()
    if entry["file"] in REFUSED:
        assert entry["decodes_with_pydicom3+pylibjpeg"] != "ok"
        with refused(REFUSED[entry["file"]]):
            picture(data)
        return
    dataset = read_dicom(data)
    pixels = stored_pixels(dataset)
    assert str(pixels.shape) == entry["array_shape"] and pixels.dtype.isnative
    syntax = dataset.file_meta.TransferSyntaxUID
    ours = DECODERS.get(syntax, ("", ""))[0]
    others = [p for p in get_decoder(syntax).available_plugins if p not in (ours, "")]
    if ours == "" or (others and "Lossless" in syntax.name):
        reference = pixel_array(dataset, decoding_plugin=others[0] if others else "")
        np.testing.assert_array_equal(pixels, reference)
    last = int(entry["frames"]) - 1
    shown = picture(data, frame=last)
    assert shown.pixels.dtype == np.uint8 and shown.pixels.shape[:2] == (dataset.Rows, dataset.Columns)
    assert shown.metadata.get("frames", 1) == last + 1
    json.dumps(shown.metadata, allow_nan=False)


def test_every_decoder_is_there_and_none_is_gpl():
    assert not any("libjpeg" in packages.replace("pylibjpeg", "") for _, packages in DECODERS.values())
    assert {plugin for plugin, _ in DECODERS.values()} == {"gdcm", "pyjpegls", "pylibjpeg"}
    assert all(plugin in get_decoder(uid).available_plugins for uid, (plugin, _) in DECODERS.items())
    jpeg = {uid for uid, (plugin, _) in DECODERS.items() if plugin == "gdcm"}
    assert jpeg == {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70)}  # pylibjpeg would need pylibjpeg-libjpeg


def test_12_bit_jpeg_is_within_one_of_another_decoder(test_data):
    # row 423 from column 100 as pylibjpeg-libjpeg 2.5 decodes it, and the sum of all; decoders may round apart
    expected = [51, 56, 54, 50, 56, 57, 57, 55, 52, 55, 62, 68, 79, 77, 79, 82]
    pixels = stored_pixels(read_dicom((test_data / "dicom" / "JPGExtended.dcm").read_bytes()))
    np.testing.assert_allclose(pixels[423, 100:116].astype(int), expected, atol=1)
    assert int(pixels.sum()) == pytest.approx(3770427, rel=1e-3) and pixels.max() == 264


def test_a_missing_decoder_is_named(monkeypatch):
    data = make_dicom(np.arange(64, dtype=np.uint16).reshape(8, 8))
    data.compress(RLELossless)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.available_plugins", ())
    with refused("missing decoder: RLE Lossless needs `pip install 'medvlm[prep]'` (pylibjpeg pylibjpeg-rle)"):
        picture(to_bytes(data))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_frames_are_those_before_compression(syntax, frames):
    pixels = np.random.default_rng(0).integers(0, 4096, (frames, 12, 10)).astype(np.uint16)
    data = make_dicom(pixels if frames > 1 else pixels[0], bits=12, NumberOfFrames=frames)
    data.compress(syntax)
    for frame in range(frames):
        np.testing.assert_array_equal(picture(to_bytes(data), frame, keep_16_bit=True).pixels, pixels[frame])
    with refused(f"no such frame: frame {frames} of {frames}"):
        picture(to_bytes(data), frames)


def test_a_truncated_stream_is_refused():
    from pydicom.encaps import encapsulate, generate_frames

    data = make_dicom(np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16), bits=12)
    data.compress(JPEGLSLossless)
    (stream,) = generate_frames(data.PixelData, number_of_frames=1)
    data.PixelData = encapsulate([stream[: len(stream) // 4 * 2]])
    with refused("unreadable DICOM"):
        picture(to_bytes(data))


def shown(pixels, *arguments, window=None, **elements):
    return picture(to_bytes(make_dicom(pixels, *arguments, **elements)), windows=window).pixels.ravel().tolist()


X = np.array([[-500, 0, 99, 150, 199, 200, 900]], np.int16)
WINDOW = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": [100, 150], "WindowWidth": [200, 100]}


def test_windows_follow_ps3_3_by_hand():
    stored = X + 1000
    linear = [0, 0, round(255 * 99 / 199), round(255 * 150 / 199), 255, 255, 255]  # (x - 99.5) / 199 + 0.5
    exact = [0, 0, round(255 * 99 / 200), round(255 * 150 / 200), 254, 255, 255]  # 255 * 199 / 200 = 253.7
    sigmoid = [round(255 / (1 + np.exp(-4 * (x - 100) / 200))) for x in X.ravel().tolist()]
    second = [0, 0, 0, round(255 * 50 / 99), 255, 255, 255]  # c = 150, w = 100: 100 is black, 199 white
    assert shown(stored, **WINDOW) == linear
    assert shown(stored, **WINDOW, VOILUTFunction="LINEAR_EXACT") == exact
    assert shown(stored, **WINDOW, VOILUTFunction="SIGMOID") == sigmoid
    assert shown(stored, **WINDOW, window=1) == second
    assert shown(stored, **WINDOW, window=((100, 200),)) == exact
    colours = picture(to_bytes(make_dicom(stored, **WINDOW)), windows=((100, 200), (0, 10), (500, 1000)))
    assert colours.pixels.shape == (1, 7, 3) and colours.pixels[0, :, 0].tolist() == exact
    assert colours.windows == [(100, 200), (0, 10), (500, 1000)]
    with refused("no such window: window 2 of 2"):
        shown(stored, **WINDOW, window=2)
    with refused("unreadable DICOM: its VOI LUT function is unknown"):
        shown(stored, **WINDOW, VOILUTFunction="OTHER")
    threshold = {**WINDOW, "WindowCenter": 100, "WindowWidth": 1}  # black up to 99.5
    assert shown(stored, **threshold) == [0, 0, 0, 255, 255, 255, 255]


def test_monochrome1_is_inverted_and_padding_is_black():
    stored = X + 1000
    elements = {**WINDOW, "PixelPaddingValue": 1900}  # 900 in modality units
    plain, inverted = shown(stored, **elements), shown(stored, "MONOCHROME1", **elements)
    assert inverted[:-1] == [255 - v for v in plain[:-1]] and inverted[-1] == plain[-1] == 0
    ranged = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500}
    assert shown(np.array([[-2000, -1600, 0, 50, 100]], np.int16), **ranged) == [0, 0, 0, 128, 255]


def test_without_a_window_8_bits_stay_and_more_are_stretched():
    assert shown(np.array([[10, 100, 200]], np.uint8)) == [10, 100, 200]
    assert shown(np.array([[10, 110, 210]], np.uint16)) == [0, 128, 255]


def test_modality_and_voi_lut():
    # stored 1, 2, 3 -> modality LUT (first entry for 1) 100, 200, 300 -> VOI LUT (first entry for 100)
    modality = sequence(LUTDescriptor=[3, 1, 16], LUTData=[100, 200, 300], ModalityLUTType="US")
    voi = sequence(LUTDescriptor=[201, 100, 8], LUTData=[v // 4 for v in range(201)])
    modality[0]["LUTDescriptor"].VR = voi[0]["LUTDescriptor"].VR = "US"
    modality[0]["LUTData"].VR = voi[0]["LUTData"].VR = "US"
    stored = np.array([[0, 1, 2, 3, 4]], np.uint16)
    data = to_bytes(make_dicom(stored, bits=12, ModalityLUTSequence=modality, VOILUTSequence=voi))
    assert picture(data).pixels.ravel().tolist() == [0, 0, 25, 50, 50]
    deep = picture(data, keep_16_bit=True)
    assert deep.pixels.ravel().tolist() == [100, 100, 200, 300, 300] and deep.metadata["value_slope"] == 1


@pytest.mark.parametrize(("declared", "white"), [(12, 255), (16, 255), (8, 255)])
def test_a_voi_lut_may_declare_more_bits_than_its_table_has(declared, white):
    """As some makers do: 16 for a table up to 4095. One of 16 bits that stays below is another's choice of white."""
    top = 255 if declared == 8 else 4095
    lut = sequence(LUTDescriptor=[2, 0, declared], LUTData=[0, top])
    lut[0]["LUTDescriptor"].VR = lut[0]["LUTData"].VR = "US"
    data = to_bytes(make_dicom(np.array([[0, 1]], np.uint16), bits=12, VOILUTSequence=lut))
    assert picture(data).pixels.ravel().tolist() == [0, white]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_16_bits_are_lossless_and_lead_back_to_modality_units(photometric):
    x = np.array([[-2048, -1, 0, 1, 2047]], np.int16)
    data = to_bytes(make_dicom(x, photometric, bits=12, RescaleSlope=2, RescaleIntercept=-10, **{"WindowCenter": 0}))
    deep = picture(data, keep_16_bit=True)
    values = [0, 2047, 2048, 2049, 4095]
    assert deep.pixels.dtype == np.uint16
    assert deep.pixels.ravel().tolist() == (values if photometric == "MONOCHROME2" else [4095 - v for v in values])
    back = deep.pixels * deep.metadata["value_slope"] + deep.metadata["value_intercept"]
    np.testing.assert_array_equal(back, x * 2.0 - 10)


def test_overlays_are_counted_and_never_drawn(test_data):
    data = make_dicom(np.full((8, 8), 100, np.uint16), bits=12, WindowCenter=100, WindowWidth=200)
    plain = picture(to_bytes(data)).pixels
    for group in (0x6000, 0x6002):
        data.add_new((group, 0x0010), "US", 8)
        data.add_new((group, 0x0011), "US", 8)
        data.add_new((group, 0x0022), "LO", "DOE JOHN")
        data.add_new((group, 0x3000), "OB", b"\xff" * 8)
    overlaid = picture(to_bytes(data))
    np.testing.assert_array_equal(overlaid.pixels, plain)
    assert overlaid.metadata["overlays"] == 2 and "DOE" not in json.dumps(overlaid.metadata)
    # retired: a plane in bits of the pixels that the grey values do not use
    data.PixelData = np.full((8, 8), 100 | 0x8000, np.uint16).tobytes()
    np.testing.assert_array_equal(picture(to_bytes(data)).pixels, plain)


def test_burnt_in_areas_are_flagged():
    grey = np.zeros((8, 8), np.uint8)
    corners = {"RegionLocationMinX0": 1, "RegionLocationMinY0": 2, "RegionLocationMaxX1": 6, "RegionLocationMaxY1": 7}
    assert metadata(make_dicom(grey, BurnedInAnnotation="YES"))["burnt_in"] is True
    assert "burnt_in" not in metadata(make_dicom(grey, BurnedInAnnotation="NO"))
    found = metadata(make_dicom(grey, SequenceOfUltrasoundRegions=sequence(**corners)))
    assert found["burnt_in"] is True and found["ultrasound_regions"] == [[1, 2, 6, 7]]


def test_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(picture(to_bytes(make_dicom(pixels, RGB))).pixels, pixels)
    planes = make_dicom(pixels, RGB, PixelData=pixels.transpose(2, 0, 1).tobytes(), PlanarConfiguration=1)
    np.testing.assert_array_equal(picture(to_bytes(planes)).pixels, pixels)
    # PS3.3 C.7.6.3.1.2: R = Y + 1.402 (Cr - 128), B = Y + 1.772 (Cb - 128), G = Y - 0.344136 Cb' - 0.714136 Cr'
    ycc = np.array([[[100, 128, 128], [100, 138, 148], [50, 100, 120]]], np.uint8)
    rgb = picture(to_bytes(make_dicom(ycc, "YBR_FULL"))).pixels[0]
    expected = [[100, 100, 100], [128, 82, 118], [39, 65, 0]]
    np.testing.assert_allclose(rgb.astype(int), expected, atol=1)
    deep = (pixels.astype(np.uint16) << 8) + pixels  # v * 257
    np.testing.assert_array_equal(picture(to_bytes(make_dicom(deep, RGB))).pixels, pixels)


def palette(bits, *tables, kind=""):
    """The elements of a palette of four entries."""
    elements = {}
    for name, values in zip(("Red", "Green", "Blue"), tables, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        data = np.array(values, np.uint16 if bits == 16 else np.uint8).tobytes()
        elements[f"{kind}{name}PaletteColorLookupTableData"] = data
    return elements


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (palette(8, [0, 50, 100, 255], [1, 2, 3, 4], [9, 8, 7, 6]), [[0, 1, 9], [50, 2, 8], [255, 4, 6]]),
        # 16-bit entries: the high byte is shown
        (palette(16, [0, 12800, 0, 65280], [256, 512, 0, 9], [9, 8, 7, 6]), [[0, 1, 0], [50, 2, 0], [255, 0, 0]]),
        # 8-bit entries in tables declared 16-bit
        (palette(16, [0, 50, 100, 255], [1, 2, 3, 4], [9, 8, 7, 6]), [[0, 1, 9], [50, 2, 8], [255, 4, 6]]),
        # segments: 0 (discrete) of one value, 1 (linear) of three values up to the last
        (palette(16, *[[0, 1, 0, 1, 3, 65280]] * 3, kind="Segmented"), [[0] * 3, [85] * 3, [255] * 3]),
    ],
)
def test_palettes(tables, expected):
    data = make_dicom(np.array([[0, 1, 3]], np.uint8), "PALETTE COLOR", **tables)
    assert picture(to_bytes(data)).pixels[0].tolist() == expected


def test_big_endian_and_deflated_are_the_same_picture():
    data = make_dicom(np.arange(64, dtype=np.uint16).reshape(8, 8) * 50, bits=12)
    plain = picture(to_bytes(data))
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(picture(to_bytes(data)).pixels, plain.pixels)
    data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    data.PixelData = (np.arange(64, dtype=">u2").reshape(8, 8) * 50).astype(">u2").tobytes()
    np.testing.assert_array_equal(picture(to_bytes(data)).pixels, plain.pixels)


def enhanced():
    groups = pydicom.Sequence()
    for k, cosines in enumerate(([-1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])):
        (group,) = sequence(
            PixelValueTransformationSequence=sequence(RescaleSlope=k + 1, RescaleIntercept=-100 * k),
            FrameVOILUTSequence=sequence(WindowCenter=100, WindowWidth=100, VOILUTFunction="LINEAR_EXACT"),
            PlaneOrientationSequence=sequence(ImageOrientationPatient=cosines),
            FrameAnatomySequence=sequence(FrameLaterality="LR"[k % 2]),
        )
        groups.append(group)
    shared = sequence(PixelMeasuresSequence=sequence(PixelSpacing=[0.5, 0.25], SliceThickness=2))
    pixels = np.tile(np.array([[50, 100, 150]], np.uint16), (3, 1, 1))
    elements = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": groups}
    return make_dicom(pixels, NumberOfFrames=3, **elements)


def test_functional_groups_of_the_frame_rule():
    frames = [picture(to_bytes(enhanced()), k) for k in range(3)]
    # x = (k + 1) v - 100 k, shown from 50 to 150
    assert [f.pixels.ravel().tolist() for f in frames] == [[0, 128, 255], [0, 128, 255], [0, 128, 255]]
    assert frames[0].windows == [(100, 100)] and frames[2].spacing == (0.25, 0.5)
    assert [f.metadata["orientation"] for f in frames] == [["R", "P"], ["P", "F"], ["P", "F"]]
    assert [f.metadata["laterality"] for f in frames] == ["L", "R", "L"]
    assert frames[1].metadata["frame"] == 1 and frames[1].metadata["slice_thickness"] == 2


def test_spacing_is_x_then_y_and_says_where_it_was_measured():
    grey = np.zeros((2, 2), np.uint8)
    both = {"PixelSpacing": [0.3, 0.2], "ImagerPixelSpacing": [0.4, 0.25]}
    shown = picture(to_bytes(make_dicom(grey, **both)))
    assert shown.spacing == (0.2, 0.3) and "spacing_at" not in shown.metadata
    shown = picture(to_bytes(make_dicom(grey, ImagerPixelSpacing=[0.4, 0.25])))
    assert shown.spacing == (0.25, 0.4) and shown.metadata["spacing_at"] == "detector"
    assert picture(to_bytes(make_dicom(grey, PixelSpacing=[0, 0.2]))).spacing is None


# --- the allow-list

TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "AS"}
MARK, DAY, UID = "SECRETMARK", "19871213", "1.2.999.4711"


def marked():
    """A file in which every text, date, time and UID of the data dictionary is marked, at the top and nested."""
    dataset = make_dicom(np.arange(64, dtype=np.uint16).reshape(8, 8) * 50, bits=12)
    nested = pydicom.Dataset()
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if tag >> 16 in (0x0000, 0x0002, 0x0004, 0xFFFE) or not keyword or keyword in dataset:
            continue
        mark = MARK if vr in TEXT else {"DA": DAY, "DT": DAY, "TM": "111213", "UI": UID}.get(vr)
        if mark:
            for target in (dataset, nested):
                target.add(pydicom.DataElement(tag, vr, mark, validation_mode=0))
    dataset.add_new((0x0009, 0x0010), "LO", MARK)
    dataset.add_new((0x0009, 0x1001), "LO", MARK)
    dataset.SharedFunctionalGroupsSequence = sequence(FrameAnatomySequence=pydicom.Sequence([nested]))
    dataset.PatientAge = "097Y"
    return dataset


def test_nothing_else_of_the_header_gets_through(tmp_path):
    data = to_bytes(marked())
    assert data.count(MARK.encode()) > 3000  # the test would see nothing in a file without marks
    (tmp_path / "a.dcm").write_bytes(data)
    for deep in (False, True):
        image, stored = encode_source(Source("a.dcm", "dicom"), tmp_path, 0, PixelOptions(keep_16_bit=deep))
        out = image.model_dump_json().encode() + stored
        assert not [mark for mark in (MARK, DAY, UID, "4711", "111213") if mark.encode() in out]
    value_keys = {"value_slope", "value_intercept"}
    assert set(image.metadata) == {"photometric_interpretation", "bits_stored", "patient_age"} | value_keys
    assert image.metadata["patient_age"] == 90 and image.view is None


def test_what_the_allow_list_lets_through():
    elements = {"Modality": "DX", "ViewPosition": "PA", "ImageLaterality": "L", "BodyPartExamined": "CHEST"}
    found = metadata(make_dicom(np.zeros((2, 2), np.uint8), PatientSex="F", PatientAge="018M", **elements))
    expected = {"modality": "DX", "view_position": "PA", "laterality": "L", "body_part": "CHEST", "patient_sex": "F"}
    assert found == {**expected, "patient_age": 1, "photometric_interpretation": "MONOCHROME2", "bits_stored": 8}
    assert all(len(code) <= 16 for _, codes in CODES.values() for code in codes.split())  # CS holds 16 characters
    for age, years in (("090Y", 90), ("091Y", 90), ("089Y", 89), ("003W", 0), ("400D", 1), ("xx", None)):
        dataset = make_dicom(np.zeros((2, 2), np.uint8))
        dataset.add(pydicom.DataElement("PatientAge", "AS", age, validation_mode=0))
        assert metadata(dataset).get("patient_age") == years


def test_what_is_no_picture_is_refused():
    data = make_dicom(np.zeros((8, 8), np.uint16))
    with refused("empty file"):
        picture(b"")
    with refused("unreadable DICOM: no DICOM prefix"):
        picture(b"text" * 100)
    with refused("unreadable DICOM"):
        picture(to_bytes(data)[:-20])
    del data.PixelData
    with refused("unreadable DICOM: it holds no pixel data"):
        picture(to_bytes(data))
