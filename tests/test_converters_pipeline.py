"""Converters of reports from a small archive to shards, through the pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import (
    PLAIN_REPORT,
    Mimic,
    chexpert_row,
    iu_xml,
    make_ct_rate,
    write_csv,
    write_dicom,
    write_image,
    write_series,
)

from data_prep import chexpert, ct_rate, generic, iu_xray, mimic_cxr
from data_prep.items import Converter
from data_prep.pipeline import PipelineOptions, run
from data_prep.pixels import PixelOptions
from medvlm.data.inspect import verify
from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError


def prepare(converter: Converter, source: Path, out: Path, **options: Any) -> tuple[dict, dict[str, list[Sample]]]:
    """The pipeline's report, and the samples of each split."""
    settings = PipelineOptions(pixels=PixelOptions(), workers=1, max_bad=0.9)
    report = run(converter, source, str(out), settings, **options)
    splits = [out / name for name in ("train", "validation", "test") if list((out / name).glob("*.tar"))]
    assert verify(splits)["problems"] == []
    readers = {folder.name: ShardReader(sorted(folder.glob("*.tar"))) for folder in splits}
    return report, {name: [r.sample(i) for i in range(len(r))] for name, r in readers.items()}


def test_mimic_with_an_image_that_is_text_and_one_that_is_missing(tmp_path):
    mimic = Mimic(tmp_path / "mimic")
    for n, split in ((1, "train"), (2, "validate"), (3, "test"), (4, "train"), (5, "train"), (6, "train")):
        mimic.add(50000000 + n, PLAIN_REPORT if n != 6 else "\n EXAMINATION:  Chest.\n", "PA LATERAL", split)
    mimic.items()
    pictures = sorted(mimic.root.glob("files/p10/*/s5000000[45]/*.jpg"))
    pictures[0].write_text("404 not found")
    pictures[-1].unlink()
    report, samples = prepare(mimic_cxr.CONVERTER, mimic.root, tmp_path / "out")
    assert {name: [s.key for s in found] for name, found in samples.items()} == {
        "train": ["s50000001"],
        "validation": ["s50000002"],
        "test": ["s50000003"],
    }
    sample = samples["train"][0]
    assert [i.view for i in sample.images] == ["PA", "LATERAL"] and sample.images[0].width == 24
    assert (sample.source, sample.license) == ("mimic_cxr", mimic_cxr.CONVERTER.license)
    told = repr(report)
    assert "neither findings nor impression" in told, told


def test_chexpert(tmp_path):
    root = tmp_path / "CheXpert-v1.0-small"
    places = {split: f"{split}/patient0000{n}/study1/view1_frontal.jpg" for n, split in enumerate(("train", "valid"))}
    for split, place in places.items():
        write_csv(root / f"{split}.csv", [chexpert_row(place, Edema="1.0", Fracture="0.0")])
        write_image(root / place)
    _, samples = prepare(chexpert.CONVERTER, tmp_path, tmp_path / "out")
    assert {name: len(found) for name, found in samples.items()} == {"train": 1, "validation": 1}
    assert samples["train"][0].labels["Edema"] == 1 and samples["train"][0].images[0].view == "AP"
    report, samples = prepare(chexpert.CONVERTER, tmp_path, tmp_path / "unpaired", questions=False)
    assert [(s.labels["Fracture"], s.messages, s.report) for s in samples["train"]] == [(0, [], {})]
    assert (report["splits"]["train"]["images"], report["splits"]["train"]["texts"]) == (1, 0)


def test_iu_xray_with_and_without_images(tmp_path):
    for n in range(1, 5):
        text = iu_xml(f"CXR{n}", [f"CXR{n}_IM-0001-1001"] if n > 1 else [], findings="Clear lungs.")
        (tmp_path / "iu" / "ecgen-radiology").mkdir(parents=True, exist_ok=True)
        (tmp_path / "iu" / "ecgen-radiology" / f"{n}.xml").write_text(text)
        write_image(tmp_path / "iu" / "NLMCXR_png" / f"CXR{n}_IM-0001-1001.png", n)
    _, samples = prepare(iu_xray.CONVERTER, tmp_path / "iu", tmp_path / "out", without_images="text")
    found = [sample for split in samples.values() for sample in split]
    assert {s.key: len(s.images) for s in found} == {"CXR1": 0, "CXR2": 1, "CXR3": 1, "CXR4": 1}
    assert next(s for s in found if s.key == "CXR1").report == {"findings": "Clear lungs."}


def test_ct_rate_volumes_are_rescaled_by_the_table(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    root = make_ct_rate(tmp_path / "ct", ["train_1_a_1", "train_1_a_2"], train_1_a_1={"RescaleIntercept": "-1000"})
    stored = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    path = root / "dataset/train/train_1/train_1_a/train_1_a_1.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([0.75, 0.75, 1.5, 1])), path)
    report, samples = prepare(ct_rate.CONVERTER, root, tmp_path / "out")
    (sample,) = samples["train"]
    from medvlm.data.volumes import decode_volume

    data = ShardReader(sorted((tmp_path / "out" / "train").glob("*.tar"))).member(0, sample.images[0].file)
    volume = decode_volume(data)
    assert (volume.min(), volume.max()) == (-1000, -1000 + stored.max()) and volume.size == stored.size
    assert sample.images[0].spacing == pytest.approx((0.75, 0.75, 1.5))
    assert sample.images[0].metadata["spacing_in_metadata"] == [0.75, 0.75, 1.5]
    assert "other reconstruction of the scan" in repr(report)
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), path)  # a header that says nothing, and says that it is true
    with pytest.raises(UserError, match=r"it is 1 x 1 x 1 mm, and 0\.75 x 0\.75 x 1\.5 mm by"):
        prepare(ct_rate.CONVERTER, root, tmp_path / "placeholder")


def test_a_pacs_export_leaves_no_identifier_in_the_shards(tmp_path):
    root, key = tmp_path / "export", tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    key.chmod(0o600)
    write_dicom(root / "a" / "IM1")
    ct = {"StudyInstanceUID": "1.2.826.2", "PatientID": "MRN0043", "AccessionNumber": "ACC78"}
    write_series(root / "b", "1.2.826.2.1", 9, **ct)
    write_series(root / "b", "1.2.826.2.2", 2, **ct)
    text = "FINDINGS: Clear lungs. Compared with 03/04/2019.\nIMPRESSION: Reported by Dr. Mustermann. Normal."
    rows = [{"AccessionNumber": "ACC77", "report": text}, {"AccessionNumber": "ACC78", "report": "Clear lungs."}]
    table = write_csv(tmp_path / "reports.csv", rows)
    options = {"table": table, "key_file": key, "dicom": "AccessionNumber"}
    _, samples = prepare(generic.CONVERTER, root, tmp_path / "out", **options)
    found = {sample.images[0].depth is not None: sample for split in samples.values() for sample in split}
    assert found[True].images[0].depth == 9 and found[False].images[0].view == "PA"
    assert found[False].images[0].metadata["patient_sex"] == "F"
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in (".tar", ".arrow"))
    for word in (b"MRN00", b"ACC7", b"1.2.826", b"Mustermann", b"MUSTERMANN", b"19511123", b"03/04/2019"):
        assert word not in written, word
