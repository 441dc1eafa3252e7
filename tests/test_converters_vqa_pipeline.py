"""Each archive of captions and questions through the pipeline: shards that verify, a bad image set aside, a table."""

from pathlib import Path

import pytest
from archives import write_csv, write_image
from questions_archives import (
    llava_med,
    path_vqa,
    pmc_oa,
    pmc_vqa,
    pmc_vqa_row,
    radfm,
    rocov2,
    slake,
    vqa_med_2019,
)

from data_prep import llava_med as llava_med_module
from data_prep import path_vqa as path_vqa_module
from data_prep import pmc_oa as pmc_oa_module
from data_prep import pmc_vqa as pmc_vqa_module
from data_prep import radfm as radfm_module
from data_prep import rocov2 as rocov2_module
from data_prep import slake as slake_module
from data_prep import vqa_med as vqa_med_module
from data_prep.pipeline import PipelineOptions, run
from data_prep.pixels import PixelOptions
from medvlm.data.inspect import verify
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError


def prepare(module, source: Path, out: Path, **options) -> tuple[dict, dict[str, ShardReader]]:
    settings = PipelineOptions(pixels=PixelOptions(), workers=1, max_bad=0.9, **options.pop("settings", {}))
    report = run(module.CONVERTER, source, str(out), settings, **options)
    folders = [out / s for s in ("train", "validation", "test") if list((out / s).glob("*.tar"))]
    problems = [p["reason"] for p in verify(folders)["problems"]]
    assert all(" is in " in p for p in problems) and bool(problems) == settings.allow_leak
    return report, {f.name: ShardReader(sorted(f.glob("*.tar"))) for f in folders}


CASES = [
    (rocov2_module, rocov2, {}, "train/ROCOv2_2023_train_000001.jpg", {"train": 2, "validation": 1, "test": 1}),
    (pmc_vqa_module, pmc_vqa, {}, "images/PMC2_F1_1.jpg", {"train": 1}),
    (llava_med_module, llava_med, {}, "images/17989794_F1.jpg", {"train": 1}),
    (slake_module, slake, {}, "imgs/xmlab3/source.jpg", {"train": 1, "validation": 1}),
    (path_vqa_module, path_vqa, {}, "pvqa/images/val/val_0001.jpg", {"train": 1, "test": 1}),
    (
        vqa_med_module,
        vqa_med_2019,
        {"year": "2019"},
        "VQAMed2019Test/VQAMed2019_Test_Images/synpic3.jpg",
        {"train": 1, "validation": 1},
    ),
    (
        radfm_module,
        radfm,
        {"table": "data_csv/pmcvqa_train.csv", "images": Path("figures")},
        "figures/PMC2_F1.jpg",
        {"train": 1},
    ),
]


@pytest.mark.parametrize(("module", "make", "options", "bad", "counts"), CASES)
def test_an_image_that_is_text_is_set_aside_and_the_rest_is_written(tmp_path, module, make, options, bad, counts):
    source = make(tmp_path / "archive")
    (source / bad).write_text("<html>404 not found</html>")
    _, readers = prepare(module, source, tmp_path / "out", **options)
    assert {name: len(reader) for name, reader in readers.items()} == counts
    told = [p.read_text() for p in (tmp_path / "out").rglob("*quarantine*.jsonl")]
    assert any(Path(bad).name in text for text in told), told
    for reader in readers.values():
        sample = reader.sample(0)
        assert (sample.source, sample.license) == (module.CONVERTER.name.replace("-", "_"), module.CONVERTER.license)
        assert sample.images[0].width == 24 and len(reader.images(0)) == 1


def test_pmc_oa_articles_are_apart_in_the_shards(tmp_path):
    source = pmc_oa(tmp_path / "archive")
    for path in (source / "images").iterdir():
        write_image(path, 1, 8)
    _, readers = prepare(pmc_oa_module, source, tmp_path / "out")
    groups = {name: {r.sample(i).group for i in range(len(r))} for name, r in readers.items()}
    assert sum(len(r) for r in readers.values()) == 80
    assert sum(map(len, groups.values())) == 40 == len(set.union(*groups.values()))


def test_splits_that_share_an_article_or_an_image_are_refused_unless_allowed(tmp_path):
    source = slake(tmp_path / "slake")
    with pytest.raises(UserError, match=r"xmlab\d/source\.jpg.*--allow-leak"):
        prepare(slake_module, source, tmp_path / "refused", language="all")
    prepare(slake_module, source, tmp_path / "allowed", language="all", settings={"allow_leak": True})
    prepare(slake_module, source, tmp_path / "apart", language="all", split="image-disjoint")
    source = pmc_vqa(tmp_path / "pmc")
    write_csv(source / "test_clean.csv", [pmc_vqa_row("PMC1_F2_1.jpg")])
    write_image(source / "images" / "PMC1_F2_1.jpg")
    with pytest.raises(UserError, match=r"'PMC1' in train and test"):
        prepare(pmc_vqa_module, source, tmp_path / "refused2")
    _, readers = prepare(pmc_vqa_module, source, tmp_path / "figures", group="figure")
    assert {name: len(reader) for name, reader in readers.items()} == {"train": 1, "test": 1}
