"""DICOM files and series for tests, written with pydicom."""

import re

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medvlm.errors import UserError


def refused(reason):
    """A UserError whose message begins with the reason, as those do that are counted."""
    return pytest.raises(UserError, match="^" + re.escape(reason))


def make_dicom(pixels, photometric="MONOCHROME2", bits=None, **elements):
    """A dataset of [H, W], [N, H, W] where NumberOfFrames is given, or [H, W, 3] for colour."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
    colour = pixels.shape[-1] == 3 and photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3 if colour else 1), photometric
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def sequence(**elements):
    """A sequence of one item."""
    item = pydicom.Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


def to_bytes(dataset):
    buffer = pydicom.filebase.DicomBytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def write_series(folder, stack, row=(1, 0, 0), column=(0, 1, 0), step=2.5, origin=(-10.0, -20.0, -30.0), **elements):
    """[N, H, W] stored values as N files, in the order of the normal; names and InstanceNumbers are shuffled.

    ``step`` is the slice distance in mm, or the vector from slice to slice. Pixels are 0.5 mm wide and 0.75 mm high.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.array(row, float), np.array(column, float)
    step = np.cross(row, column) * step if np.isscalar(step) else np.array(step, float)
    uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), "Modality": "CT"}
    fixed = {**uids, "PixelSpacing": [0.75, 0.5], "RescaleSlope": 1, "RescaleIntercept": -1024, **elements}
    names = np.random.default_rng(0).permutation(len(stack))
    paths = []
    for i, (pixels, name) in enumerate(zip(stack, names, strict=True)):
        dataset = make_dicom(pixels, **fixed)
        dataset.ImageOrientationPatient = [round(float(v), 9) for v in (*row, *column)]
        dataset.ImagePositionPatient = [round(float(v), 6) for v in np.array(origin) + i * step]
        dataset.InstanceNumber = int(len(stack) - name)
        paths.append(folder / f"{name:03d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths
