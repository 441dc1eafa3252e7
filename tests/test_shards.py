"""Writing shards, their index, and what of a damaged one is noticed."""

import io
import os
import shutil
import tarfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pytest
import webdataset
from toy import make_shards, png, sample

from medvlm.data.index import MERGED, Tar, tars_of
from medvlm.data.loader import Encoded, MicroBatches, collate
from medvlm.data.schema import Sample
from medvlm.data.shards import (
    INDEX_SCHEMA,
    Merger,
    ShardReader,
    find_tars,
    index_path,
    index_shards,
    index_tar,
    merge_index,
    write_index,
    write_shard,
    write_shards,
)
from medvlm.data.verify import verify
from medvlm.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_shards(tmp_path / "toy", 24)


@pytest.fixture
def tar(folder) -> Path:
    return folder / "toy-000000.tar"


def place(tar: Path, name: str) -> tuple[int, int, int]:
    """Where a member's header, data and next header begin."""
    with tarfile.open(tar) as archive:
        member = archive.getmember(name)
    return member.offset, member.offset_data, member.offset_data + -(-member.size // 512) * 512


def damage(tar: Path, at: int, data: bytes | None = None) -> None:
    """Overwrite bytes, or flip one bit."""
    whole = bytearray(tar.read_bytes())
    data = data or bytes([whole[at] ^ 1])
    whole[at : at + len(data)] = data
    tar.write_bytes(whole)


def contents(reader: ShardReader) -> list:
    return [reader.load(i) for i in range(len(reader))]


# Writing


def test_a_shard_is_what_webdataset_reads_and_the_same_items_give_the_same_bytes(tmp_path):
    items = [sample(i, i % 3, ["yes"]) for i in range(5)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(iter(items), tmp_path / name / "x.tar")
    for name in ("x.tar", "x.arrow"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    read = list(webdataset.WebDataset(str(tmp_path / "a" / "x.tar"), shardshuffle=False))
    assert [s["__key__"] for s in read] == [s.key for s, _ in items]
    assert [{k: v for k, v in s.items() if k.endswith("png")} for s in read] == [members for _, members in items]


def test_a_shard_that_is_not_finished_has_no_name(tmp_path):
    def breaks():
        yield sample(0, 1, ["yes"])
        raise RuntimeError("the power fails")

    write_shard([sample(7, 1, ["no"])], tmp_path / "x.tar")
    before = (tmp_path / "x.tar").read_bytes()
    with pytest.raises(RuntimeError):
        write_shard(breaks(), tmp_path / "x.tar")
    with pytest.raises(RuntimeError):
        write_shard(breaks(), tmp_path / "y.tar")
    assert (tmp_path / "x.tar").read_bytes() == before and not (tmp_path / "y.tar").exists()
    assert find_tars([tmp_path]) == [tmp_path / "x.tar"]


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b)))
    write_shard([sample(0, 1, ["yes"])], tmp_path / "x.tar")
    assert done == ["fsync", "x.tar", "fsync", "x.arrow"]


# The index


def test_rows_columns_and_lists_are_those_of_the_arrow_table(folder):
    for merged in (False, True):
        if merged:
            merge_index(folder)
        for reader in (ShardReader(folder), ShardReader([folder / "toy-000001.tar", folder])):
            records = reader.table.to_pylist()
            assert len(records) == len(reader) == reader.column("turns").size
            for i, record in enumerate(records):
                assert reader.row(i)._asdict() == {name: record[name] for name in reader.row(i)._fields}
            for name in ("turns", "characters", "shard", "key", "source", "split", "group"):
                assert reader.column(name).tolist() == [r[name] for r in records]
            for name in ("widths", "heights", "depths", "sizes"):
                starts, values = reader.lists(name)
                assert [v.tolist() for v in np.split(values, starts[1:-1])] == [r[name] for r in records]
            assert reader.keys([3, 1]) == [records[3]["key"], records[1]["key"]]
            with pytest.raises(IndexError):
                reader.row(len(reader))
    assert reader.source_tars == [1, 3] and reader.shard_samples == [10, 10, 10, 4]


def test_the_depth_of_a_volume_is_in_the_index(tmp_path):
    volume = Sample.model_validate(
        sample(0, 1, ["yes"])[0].model_dump() | {"images": [{"file": "0.b2", "width": 64, "height": 48, "depth": 20}]}
    )
    write_shard([(volume, {"0.b2": b"frame"}), sample(1, 2, ["yes"])], tmp_path / "x.tar")
    reader = ShardReader(tmp_path)
    assert reader.table["depths"].to_pylist() == [[20], [0, 0]] and reader.load(0)[1] == [b"frame"]


def test_the_merged_index_is_one_uncompressed_batch_and_is_enough_alone(folder):
    expected = contents(ShardReader(folder))
    assert merge_index(folder) == folder / MERGED
    for tar in find_tars([folder]):
        index_path(tar).unlink()
    reader = ShardReader(folder)
    assert contents(reader) == expected
    with pa.memory_map(str(folder / MERGED)) as source:
        assert pa.ipc.open_file(source).num_record_batches == 1
    before = pa.total_allocated_bytes()
    assert reader.column("turns").flags.owndata is False and pa.total_allocated_bytes() == before


def test_indexes_are_merged_as_arrow_concatenates_them_without_being_held(folder, tmp_path):
    """Also rows from the middle of others, in many chunks, words in another order, and none at all."""
    table = pa.concat_tables([index_tar(tar) for tar in find_tars([folder])])
    others = table.set_column(table.schema.get_field_index("members"), "members", [[["c", "a"], [], ["b"]] * 8])
    others = others.cast(INDEX_SCHEMA)
    many = pa.concat_tables([table.slice(5, 11)] * 100)
    parts = [table.slice(3, 4), others.slice(1, 20), table.slice(0, 0), many]
    merger, before = Merger(tmp_path), pa.total_allocated_bytes()
    for n, part in enumerate(parts):
        merger.add(part, [Tar(f"{n}.tar", 512, len(part), "")])
        assert pa.total_allocated_bytes() - before < 1 << 16
    merger.write(tmp_path / MERGED)
    assert pa.total_allocated_bytes() - before < 1 << 16 and set(os.listdir(tmp_path)) == {"toy", MERGED}
    with pa.memory_map(str(tmp_path / MERGED)) as source:
        merged = pa.ipc.open_file(source).read_all()
        merged.validate(full=True)
    assert merged.drop(["shard"]).to_pylist() == pa.concat_tables(parts).to_pylist()
    assert merged["shard"].to_pylist() == [n for n, part in enumerate(parts) for _ in range(len(part))]


def test_a_stale_merged_index_is_said_and_not_used(folder, tmp_path):
    merge_index(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ShardReader(folder)) == 24
    write_shard([sample(90, 1, ["yes"])], folder / "toy-000003.tar")
    with pytest.warns(UserWarning, match="toy-000003.tar is not in it"):
        assert ShardReader(folder).key(24) == "s0090"
    (folder / "toy-000003.tar").unlink()
    tar = folder / "toy-000001.tar"
    size = tar.stat().st_size
    with_other_pixels = [(s, {n: png(7) for n in m}) for s, m in (sample(i, 1, ["yes"]) for i in range(10, 20))]
    write_shard(with_other_pixels, tar)
    tar.write_bytes(tar.read_bytes().ljust(size, b"\0"))
    write_index(tar)  # the same tars of the same sizes
    with pytest.warns(UserWarning, match="toy-000001.tar was indexed again"):
        assert ShardReader(folder).load(10)[1] == [png(7)]
    merge_index(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ShardReader(folder).load(10)[1] == [png(7)]


def test_a_copied_folder_keeps_its_merged_index(folder, tmp_path):
    merge_index(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / MERGED, (0, 0))  # older than all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ShardReader(tmp_path / "copy").index_hash == ShardReader(folder).index_hash


def test_the_index_hash_is_of_the_data_and_not_of_its_place(folder, tmp_path):
    before = ShardReader(folder).index_hash
    shutil.copytree(folder, tmp_path / "copy")
    merge_index(tmp_path / "copy")
    assert ShardReader(tmp_path / "copy").index_hash == before
    tar = tmp_path / "copy" / "toy-000001.tar"
    damage(tar, place(tar, "s0010.0.png")[1] + 60)
    list(index_shards([tmp_path / "copy"]))
    assert ShardReader(tmp_path / "copy").index_hash != before


def test_an_index_of_another_version_or_none_is_refused_with_the_mend(tar):
    old = feather.read_table(index_path(tar)).replace_schema_metadata(None)
    feather.write_feather(old, index_path(tar))
    with pytest.raises(
        UserError, match=r"toy-000000.arrow: the index has version 1, not 2; index again: `medvlm shards"
    ):
        ShardReader(tar)
    index_path(tar).write_bytes(b"ARROW1 not")
    with pytest.raises(UserError, match=r"toy-000000.arrow: the index cannot be read"):
        ShardReader(tar)
    index_path(tar).unlink()
    with pytest.raises(UserError, match=r"toy-000000.tar: has no index"):
        ShardReader(tar)


# Foreign tars


def foreign(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_foreign_tar_reads_as_webdataset_reads_it(tmp_path, form):
    long = "folder/" + "deep/" * 30 + "x" * 90
    members = {
        "train/0001/a.JPG": b"one",
        "train/0001/a.json": b'{"caption": "x"}',
        "train/0001/a.meta.json": b"{}",
        "train/0002/a.jpg": b"two",
        f"{long}.png": b"three",
        f"{long}.seg.png": b"four",
        "\u00fcber.txt": b"five",
        ".hidden": b"not a sample",
        "README": b"no extension",
    }
    tar = foreign(tmp_path / "x.tar", members, format=form)
    assert list(index_shards([tmp_path])) == [
        f"{tar}: 4 samples; 2 member(s) without key or extension left out",
        str(tmp_path / MERGED),
    ]
    reader = ShardReader(tmp_path)
    read = {reader.key(i): {name: reader.member(i, name) for name in reader.row(i).members} for i in range(len(reader))}
    theirs = webdataset.WebDataset(str(tar), shardshuffle=False)
    assert read == {s.pop("__key__"): {k: v for k, v in s.items() if k[0] != "_"} for s in theirs}
    with pytest.raises(UserError, match=r"x.tar:train/0001/a.json: key: Field required"):
        reader.load(0)


def test_our_samples_in_a_foreign_layout_load(tmp_path):
    one, files = sample(0, 1, ["yes"])
    record = one.model_dump_json().encode()
    filler = {f"x{i}.bin": bytes(50_000) for i in range(3)}  # the image lies far from its json
    foreign(tmp_path / "x.tar", {"in/a.0.PNG": files["0.png"], **filler, "in/a.JSON": record})
    list(index_shards([tmp_path]))
    reader = ShardReader(tmp_path)
    assert reader.load(0) == (one, [files["0.png"]]) and reader.images(0) == [files["0.png"]]


def test_links_are_refused_and_not_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"member 'a.jpg' is a link"):
        index_tar(tmp_path / "x.tar")


def test_an_index_apart_serves_tars_that_lie_elsewhere(folder, tmp_path):
    expected = contents(ShardReader(folder))
    for tar in find_tars([folder]):
        index_path(tar).unlink()
    lines = list(index_shards([folder], tmp_path / "mine"))
    assert len(lines) == 4 and not list(folder.glob("*.arrow"))
    assert contents(ShardReader(tmp_path / "mine")) == expected
    (folder / "toy-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"toy-000000.tar: truncated"):
        ShardReader(tmp_path / "mine")


def test_braces_name_many_tars_and_a_tar_may_not_take_the_name_of_the_merged_index(folder):
    assert find_tars([f"{folder}/toy-{{000000..000002}}.tar"]) == sorted(folder.glob("*.tar"))
    (folder / "toy-000000.tar").rename(folder / "index.tar")
    with pytest.raises(UserError, match=r"index.tar: rename it"):
        write_index(folder / "index.tar")


# Faults


def quarantined(reader: ShardReader) -> list[str]:
    """What a loader would quarantine, with reasons."""
    reasons = []
    for i in range(len(reader)):
        try:
            reader.load(i)
        except UserError as error:
            reasons.append(str(error))
    return reasons


@pytest.mark.parametrize("member", ["s0003.0.png", "s0003.json"])
def test_a_flipped_bit_costs_its_sample_and_is_named(folder, tar, member):
    merge_index(folder)
    damage(tar, place(tar, member)[1] + 60)
    (reason,) = quarantined(ShardReader(folder))
    assert reason.startswith(f"{tar}:{member}: checksum differs from the index")


def test_the_loader_quarantines_a_damaged_sample_with_its_reason(folder, tar):
    damage(tar, place(tar, "s0003.0.png")[1] + 60)
    damage(tar, place(tar, "s0004.json")[1] + 60)
    whole = ShardReader(folder)
    rows = partial(collate, pad_id=0, image_size=8, padding_free=False)
    dataset = MicroBatches(whole, lambda sample, images, repeat: Encoded([1, 2], [-100, 2]), rows)
    batch = dataset[[(i, 0) for i in range(6)]]
    assert [key for key, _ in batch.quarantined] == ["s0003", "s0004"] and len(batch.input_ids) == 4
    for (key, reason), member in zip(batch.quarantined, ("0.png", "json"), strict=True):
        assert reason.startswith(f"{tar}:{key}.{member}: checksum differs")


@pytest.mark.parametrize("merged", [False, True])
def test_a_truncated_shard_is_refused_at_once_and_one_cut_later_costs_what_is_gone(folder, tar, merged):
    if merged:
        merge_index(folder)
    reader = ShardReader(folder)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: place(tar, "s0007.0.png")[1] + 9])
    for reason in (found := quarantined(reader)):
        assert "cut off after" in reason and str(tar) in reason
    assert len(found) == 3  # s0007, s0008 and s0009 of 24
    context = pytest.warns(UserWarning, match="out of date") if merged else warnings.catch_warnings()
    with (
        context,
        pytest.raises(UserError, match=rf"{tar}: truncated, it has \d+ bytes and its index expects {len(whole)}"),
    ):
        ShardReader(folder)


def test_a_header_overwritten_after_indexing_loses_nothing_and_verify_tells(folder, tar):
    expected = contents(ShardReader(folder))
    damage(tar, place(tar, "s0004.json")[0], b"\xff" * 512)
    plain = [s["__key__"] for s in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert len(plain) < 10  # a plain reader stops there without a word
    assert contents(ShardReader(folder)) == expected
    assert any("damaged header" in p["reason"] for p in verify(folder)["problems"])


@pytest.mark.parametrize("header", [b"\xff" * 512, bytes(512)])
def test_a_header_overwritten_before_indexing_is_refused(tar, header):
    at = place(tar, "s0004.json")[0]
    damage(tar, at, header)
    with pytest.raises(UserError, match=f"{tar}: damaged header at byte {at}"):
        index_tar(tar)


def test_a_tar_cut_anywhere_is_not_indexed_unless_only_its_end_mark_lacks_and_that_is_allowed(tar):
    whole = tar.read_bytes()
    header, data, _ = place(tar, "s0009.json")
    for cut in (header + 100, data + 9):
        tar.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{tar}: .*truncated"):
            index_tar(tar)
    tar.write_bytes(whole[:header])  # between two members, where tarfile sees nothing amiss
    with pytest.raises(UserError, match=f"{tar}: truncated at byte {header}.*--no-end-mark"):
        index_tar(tar)
    assert index_tar(tar, end_mark=False).num_rows == 9


def test_an_absent_member_is_named(tmp_path):
    one, _ = sample(0, 1, ["yes"])
    foreign(tmp_path / "x.tar", {"a.json": one.model_dump_json().encode(), "b.png": png(1)})
    list(index_shards([tmp_path]))
    reader = ShardReader(tmp_path)
    with pytest.raises(UserError, match=r"x.tar:a.0.png: no such member"):
        reader.load(0)
    with pytest.raises(UserError, match=r"x.tar:b.json: no such member"):
        reader.load(1)
    with pytest.raises(UserError, match=r"x.tar:b.jpg: no such member"):
        reader.member(1, "jpg")


# Cost


def test_a_sample_is_one_read(folder, monkeypatch):
    merge_index(folder)
    reader = ShardReader(folder)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: (reads.append(a), pread(*a))[1])
    assert len(reader.load(2)[1]) == 2
    assert len(reads) == 1


def test_descriptors_are_bounded_and_the_least_recently_used_go(tmp_path):
    write_shards((sample(i, 0, ["yes"]) for i in range(40)), tmp_path, "x", samples_per_shard=1)
    reader = ShardReader(tmp_path, open_files=8)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for i in range(40):
            assert reader.load(i)[0].key == reader.key(i)
            reader.load(0)
            assert len(os.listdir("/proc/self/fd")) <= before + 8
    assert 0 in reader._files


def test_the_index_knows_the_size_and_digest_of_each_tar(folder):
    merge_index(folder)
    tars = tars_of(feather.read_table(folder / MERGED).schema, "")
    assert [(t.name, t.size, t.samples) for t in tars] == [
        (p.name, p.stat().st_size, n) for p, n in zip(find_tars([folder]), (10, 10, 4), strict=True)
    ]
    assert feather.read_table(index_path(folder / tars[0].name)).schema.names == INDEX_SCHEMA.names
