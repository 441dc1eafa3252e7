"""Series and NIfTI -> one orientation, windows, blosc2 frames; references: SimpleITK, nibabel, arithmetic by hand."""

import gzip
import os

import blosc2
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import DATA
from medical_files import make_dicom, refused, sequence, write_series

from medvlm.data.nifti import read_nifti
from medvlm.data.series import read_series
from medvlm.data.volumes import compact, decode_volume, encode_volume, read_subvolume, volume_shape, window

NIFTI = sorted((DATA / "nifti").glob("*.nii*")) if DATA.is_dir() else []
SQRT = 0.5**0.5
ACQUISITIONS = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "axial seen from above": ((-1, 0, 0), (0, 1, 0)),
    "axial turned by 180 degrees": ((-1, 0, 0), (0, -1, 0)),
    "axial with rows and columns exchanged": ((0, 1, 0), (1, 0, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "sagittal from the other side": ((0, -1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "coronal upwards": ((-1, 0, 0), (0, 0, 1)),
    "oblique by 20 degrees": ((1, 0, 0), (0, np.cos(np.radians(20)), np.sin(np.radians(20)))),
}


def stored(shape=(5, 7, 9), seed=0):
    return np.random.default_rng(seed).integers(0, 4000, shape).astype(np.int16)


def by_simpleitk(folder):
    """(array [z, y, x], spacing (x, y, z)) of a folder by GDCM's series reader, turned to LPS."""
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.DICOMOrient(sitk.ReadImage(names), "LPS")
    return sitk.GetArrayFromImage(image), image.GetSpacing()


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_a_series_is_simpleitks_voxel_for_voxel_in_every_direction(tmp_path, name):
    write_series(tmp_path, stored(), *ACQUISITIONS[name])
    volume = read_series(tmp_path)
    expected, spacing = by_simpleitk(tmp_path)
    assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.spacing, spacing, atol=1e-5)
    assert volume.metadata.get("oblique_degrees") == (20.0 if "oblique" in name else None)


@pytest.mark.parametrize("name", [n for n in ACQUISITIONS if "oblique" not in n])
def test_left_stays_left(tmp_path, name):
    row, column = (np.array(v, float) for v in ACQUISITIONS[name])
    step, origin = np.cross(row, column) * 2.5, np.array([-10.0, -20.0, -30.0])
    stack = np.zeros((6, 8, 10), np.int16)
    stack[4, 2, 7] = 1000
    point = origin + 7 * 0.5 * row + 2 * 0.75 * column + 4 * step  # of the bright voxel, in mm: left, back, head
    write_series(tmp_path, stack, row, column, RescaleIntercept=0)
    volume = read_series(tmp_path)
    (index,) = np.argwhere(volume.array == 1000)
    corners = [origin + i * 0.5 * row + j * 0.75 * column + k * step for i in (0, 9) for j in (0, 7) for k in (0, 5)]
    corner = np.min(corners, axis=0)  # the right-most, front-most, lowest voxel is index (0, 0, 0)
    np.testing.assert_allclose(corner + index[::-1] * volume.spacing, point, atol=1e-6)


def test_a_series_and_the_same_nifti_are_one(tmp_path):
    write_series(tmp_path / "series", stored(), *ACQUISITIONS["sagittal"])
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    series, nifti = read_series(tmp_path / "series"), read_nifti(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(series.array, nifti.array)
    assert series.spacing == nifti.spacing


def test_slices_with_scales_of_their_own(tmp_path):
    paths = write_series(tmp_path, stored())
    for i, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + i / 4, -i
        dataset.save_as(path)
    volume = read_series(tmp_path)
    assert volume.array.dtype == np.float32  # not all are whole numbers
    np.testing.assert_array_equal(volume.array, [s * (1 + i / 4) - i for i, s in enumerate(stored())])


def test_an_enhanced_file_gives_a_volume_by_its_frames_positions(tmp_path):
    stack, order = stored((4, 6, 5)), [2, 0, 3, 1]
    groups = pydicom.Sequence()
    for k in order:
        (group,) = sequence(
            PlanePositionSequence=sequence(ImagePositionPatient=[0, 0, 3.0 * k]),
            PixelValueTransformationSequence=sequence(RescaleSlope=2, RescaleIntercept=-10 * k),
        )
        groups.append(group)
    shared = sequence(
        PlaneOrientationSequence=sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=sequence(PixelSpacing=[0.75, 0.5]),
    )
    dataset = make_dicom(stack[order], NumberOfFrames=4, SharedFunctionalGroupsSequence=shared)
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    volume = read_series(tmp_path / "a.dcm")
    np.testing.assert_array_equal(volume.array, [2 * s - 10 * k for k, s in enumerate(stack)])
    assert volume.spacing == (0.5, 0.75, 3.0)


def test_gantry_tilt_is_reported(tmp_path):
    angle = np.radians(15)
    column = (0, np.cos(angle), np.sin(angle))  # the gantry leans while the table moves along the patient
    write_series(tmp_path, stored(), (1, 0, 0), column, step=(0, 0, 2.0))
    volume = read_series(tmp_path)
    assert volume.metadata["gantry_tilt_degrees"] == 15.0
    assert volume.spacing[2] == pytest.approx(2.0 * np.cos(angle), abs=1e-5)


def change(path, **elements):
    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def moved(path, z):
    position = [float(v) for v in pydicom.dcmread(path).ImagePositionPatient]
    change(path, ImagePositionPatient=[*position[:2], position[2] + z])


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        ("missing slices: a gap of 5.00 mm where 2.50 mm", lambda paths: paths[2].unlink()),
        ("missing slices", lambda paths: paths[1].unlink()),
        ("uneven slice spacing: a slice lies 0.40 mm off", lambda paths: moved(paths[2], 0.4)),
        ("duplicate slice positions: 1 slices", lambda paths: moved(paths[2], 2.5)),
        ("several series: 2", lambda paths: change(paths[2], SeriesInstanceUID="1.2.3")),
        ("slices of differing size", lambda p: change(p[1], Rows=6, PixelData=b"\0" * 108)),
        ("slices of differing pixel spacing", lambda paths: change(paths[1], PixelSpacing=[0.75, 0.51])),
        ("slices of differing direction", lambda p: change(p[1], ImageOrientationPatient=[1, 0, 0, 0, SQRT, SQRT])),
        ("no slice positions", lambda paths: change(paths[1], ImagePositionPatient=None)),
        ("no slice positions", lambda p: change(p[1], ImageOrientationPatient=[0, 0, 0, 0, 0, 0])),
        ("single slice", lambda paths: [p.unlink() for p in paths[1:]]),
        ("no slices", lambda paths: [p.unlink() for p in paths]),
        ("unreadable DICOM: no DICOM prefix", lambda p: (p[0].parent / "notes.txt").write_text("x" * 300)),
    ],
)
def test_what_is_no_regular_grid_is_refused(tmp_path, reason, damage):
    paths = write_series(tmp_path, stored())
    (tmp_path / "DICOMDIR").write_bytes(b"an index")  # these two are no slices
    (tmp_path / ".hidden").write_bytes(b"of a desktop")
    read_series(tmp_path)
    damage(paths)
    with refused(reason):
        read_series(tmp_path)


def test_rounded_positions_are_no_gap(tmp_path):
    paths = write_series(tmp_path, stored((9, 4, 4)), step=0.625)
    for path in paths:
        position = [round(float(v), 1) for v in pydicom.dcmread(path).ImagePositionPatient]
        change(path, ImagePositionPatient=position)
    assert read_series(tmp_path).spacing[2] == pytest.approx(0.625, abs=0.01)


def test_one_of_several_series_is_chosen(tmp_path):
    first, second = stored(seed=1), stored(seed=2)
    write_series(tmp_path / "a", first)
    uid = pydicom.dcmread(next((tmp_path / "a").iterdir())).SeriesInstanceUID
    for path in write_series(tmp_path / "b", second):
        path.rename(tmp_path / "a" / f"b{path.name}")
    report = make_dicom(np.zeros((2, 2), np.uint8), SeriesInstanceUID="1.2.3")
    del report.PixelData
    report.save_as(tmp_path / "a" / "report.dcm", enforce_file_format=True)
    (tmp_path / "a" / "notes.txt").write_text("of the archive")
    np.testing.assert_array_equal(read_series(tmp_path / "a", uid).array, first - 1024)


# --- NIfTI


@pytest.mark.parametrize("path", NIFTI, ids=lambda p: p.name)
def test_real_nifti_is_nibabels_and_simpleitks(path):
    volume = read_nifti(path)
    ras = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)  # [x, y, z], to right... of RAS
    np.testing.assert_array_equal(volume.array, ras.transpose(2, 1, 0)[:, ::-1, ::-1])
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(volume.spacing, image.GetSpacing(), atol=1e-4)
    part = (slice(2, 9), slice(30, 50), slice(None, 20))
    np.testing.assert_array_equal(read_nifti(path, slices=part).array, volume.array[part])


def test_the_real_nifti_files_include_a_big_endian_one(test_data):
    assert ">" in {nibabel.load(path).header.endianness for path in NIFTI}


def write_nifti(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def with_scale(path, slope, intercept):
    """Write the header's slope and intercept (bytes 112 and 116), which nibabel chooses itself."""
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(data)
    return path


def test_slope_and_intercept_of_the_header_and_those_that_replace_them(tmp_path):
    array = stored()
    path = with_scale(write_nifti(tmp_path / "a.nii", array), 2, -1000)
    expected = read_nifti(write_nifti(tmp_path / "plain.nii", array)).array.astype(int)
    np.testing.assert_array_equal(read_nifti(path).array, expected * 2 - 1000)
    np.testing.assert_array_equal(read_nifti(path, slope=1, intercept=-8192).array, expected - 8192)
    halves = with_scale(path, 0.5, 0)
    assert read_nifti(halves).array.dtype == np.float32
    np.testing.assert_array_equal(read_nifti(halves).array, expected / 2)


def test_a_4d_file_needs_a_choice(tmp_path):
    array = stored((4, 5, 6, 3))
    path = write_nifti(tmp_path / "a.nii.gz", array)
    with refused("4D volume"):
        read_nifti(path)
    with refused("no such volume"):
        read_nifti(path, volume=3)
    one = read_nifti(write_nifti(tmp_path / "one.nii", array[..., 2])).array
    np.testing.assert_array_equal(read_nifti(path, volume=2).array, one)
    np.testing.assert_array_equal(read_nifti(write_nifti(tmp_path / "single.nii", array[..., 2:])).array, one)


def test_voxels_that_are_not_finite(tmp_path):
    array = stored().astype(np.float32)
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    path = write_nifti(tmp_path / "a.nii", array)
    with refused("voxels that are not finite"):
        read_nifti(path)
    filled = read_nifti(path, nan_value=-1024)
    assert filled.array.dtype == np.int16 and (filled.array == -1024).sum() == 2


def test_unknown_or_senseless_orientation_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii", stored())
    codes = bytearray(path.read_bytes())
    codes[252:256] = bytes(4)  # qform_code, sform_code
    path.write_bytes(codes)
    with refused("no orientation"):
        read_nifti(path)
    expected = stored().transpose(2, 1, 0)[:, ::-1]  # L stays, A turns to P
    np.testing.assert_array_equal(read_nifti(path, axes="LAS").array, expected)
    with refused("axes: 'LRS'"):
        read_nifti(path, axes="LRS")
    for value in (np.nan, 0.0):
        affine = np.eye(4)
        path = write_nifti(tmp_path / "b.nii", stored(), affine)
        data = bytearray(path.read_bytes())
        data[252:256], data[280:284] = b"\0\0\1\0", np.array(value, "<f4").tobytes()  # sform alone; srow_x[0]
        path.write_bytes(data)
        with refused("unusable orientation"):
            read_nifti(path)


def test_spacing_is_in_millimetres(tmp_path):
    image = nibabel.Nifti1Image(stored(), np.diag([500.0, 750, 2000, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "a.nii")
    assert read_nifti(tmp_path / "a.nii").spacing == (0.5, 0.75, 2.0)


def test_damaged_nifti_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", stored((20, 20, 20)))
    data = path.read_bytes()
    flipped = bytearray(gzip.compress(gzip.decompress(data)))
    flipped[len(flipped) // 2] ^= 0xFF
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii")
    cases = {b"": "empty file", b"not a volume": "unreadable NIfTI", data[: len(data) // 2]: "unreadable NIfTI"}
    cases |= {bytes(flipped): "unreadable NIfTI", gzip.compress((tmp_path / "rgb.nii").read_bytes()): "unusable voxel"}
    for content, reason in cases.items():
        path.write_bytes(content)
        with refused(reason):
            read_nifti(path)


# --- values, windows, frames


def test_compact_keeps_values(tmp_path):
    raw = np.array([[[-(2**15), 0, 2**15 - 1]]], np.int32)
    assert compact(raw).dtype == np.int16 and (compact(raw) == raw).all()
    assert compact(raw, 1, 1).dtype == np.float32 and (compact(raw, 1, 1) == raw + 1).all()
    assert compact(raw.astype(np.float32)).dtype == np.int16
    assert compact(raw + 0.5).dtype == np.float32
    assert compact(2 * (raw // 4), 0.5).dtype == np.int16


def test_windows_by_hand():
    # centre 40, width 400: -160 is black, 240 white; 255 steps in 400 HU
    x = np.array([-32768, -1024, -161, -160, -159, -158, 40, 239, 240, 241, 32767], np.int16)
    expected = [0, 0, 0, 0, 1, 1, 128, 254, 255, 255, 255]  # 0.6375 -> 1, 1.275 -> 1, 127.5 -> 128 (even), 254.36
    shown = window(x.reshape(1, 1, -1), [(40, 400), (-600, 1500)])
    assert shown.dtype == np.uint8 and shown.shape == (2, 1, 1, 11)
    assert shown[0].ravel().tolist() == expected
    assert shown[1].ravel()[[1, 3, 8]].tolist() == [55, 202, 255]  # 326/1500, 1190/1500, above
    np.testing.assert_array_equal(window(x.reshape(1, 1, -1).astype(np.float32), [(40, 400), (-600, 1500)]), shown)
    for bad in ([], [(40, 0)], [(40, -1)], [(40, float("nan"))]):
        with refused("windows"):
            window(x.reshape(1, 1, -1), bad)


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 9), (40, 300, 280)])
def test_frames_give_back_the_array(dtype, shape):
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    array = array if dtype != "uint8" else np.stack([array, 255 - array])
    data = encode_volume(array)
    np.testing.assert_array_equal(decode_volume(data), array)
    assert volume_shape(data) == array.shape and decode_volume(data).dtype == array.dtype
    part = (*[slice(0, 1)] * (array.ndim - 3), slice(0, 30), slice(5, 260), slice(3, None))
    np.testing.assert_array_equal(read_subvolume(data, part), array[part])
    turned = np.asfortranarray(array[..., ::-1])
    assert encode_volume(turned) == encode_volume(np.ascontiguousarray(turned))
    big = array.astype(array.dtype.newbyteorder(">"))
    assert encode_volume(big) == data


def test_a_sub_volume_touches_only_its_own_chunks():
    array = np.random.default_rng(0).integers(0, 4000, (64, 64, 64)).astype(np.int16)
    data = bytearray(encode_volume(array))  # four chunks of 16 slices, in order
    middle = len(data) * 5 // 8
    data[middle - 2000 : middle + 2000] = bytes(4000)  # inside the third
    np.testing.assert_array_equal(read_subvolume(bytes(data), (slice(0, 32),)), array[:32])
    np.testing.assert_array_equal(read_subvolume(bytes(data), (slice(48, 64),)), array[48:])
    with refused("unreadable volume"):
        decode_volume(bytes(data))


@pytest.mark.parametrize("variable", [("BLOSC_NTHREADS", "4"), ("BLOSC_CLEVEL", "9"), ("BLOSC_SHUFFLE", "SHUFFLE")])
def test_equal_arrays_give_equal_bytes_whatever_the_number_of_threads(monkeypatch, variable):
    array = np.random.default_rng(0).integers(0, 4000, (40, 300, 280)).astype(np.int16)
    data = encode_volume(array)
    before = blosc2.set_nthreads(4)
    try:
        monkeypatch.setenv(*variable)
        assert {encode_volume(array) for _ in range(3)} == {data}
        assert os.environ[variable[0]] == variable[1]
    finally:
        blosc2.set_nthreads(before)


def test_what_is_no_volume_is_refused():
    for array in (np.zeros((2, 2), np.int16), np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 2), np.float64)):
        with refused("volume"):
            encode_volume(array)
    data = encode_volume(stored())
    for bad in (b"", b"text", data[: len(data) // 2]):
        with refused("unreadable volume"):
            decode_volume(bad)
    with refused("sub-volume"):
        read_subvolume(data, (slice(0, 4, 2),))
