"""Reading from real servers on this machine: HTTP that fails in every way, and S3."""

import multiprocessing
import re
import time
import warnings
from pathlib import Path

import pytest
from toy import make_shards
from web import serve

from medvlm.data import storage
from medvlm.data.cache import Cache
from medvlm.data.shards import ShardReader, index_shards, merge_index
from medvlm.data.storage import AbsentError, Policy, StorageError, info, read_file, read_range, write_file
from medvlm.errors import UserError

KiB = 1024


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "policy", Policy(3, first_wait=0.01, longest_wait=0.02, connect=1.0, read=0.2))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = make_shards(tmp_path_factory.mktemp("data") / "toy", 24)
    merge_index(folder)
    return folder


@pytest.fixture
def web(shards):
    with serve(shards) as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def url(request, web, shards, monkeypatch) -> str:
    """The address of the first tar on a server with faults, by either transport."""
    if request.param == "http":
        return f"{web.url}/toy-000000.tar"
    import s3fs

    for name, value in {"AWS_ENDPOINT_URL": web.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    request.addfinalizer(s3fs.S3FileSystem.clear_instance_cache)
    web.folder = shards.parent  # so that the folder is the bucket
    return f"s3://{shards.name}/toy-000000.tar"


@pytest.fixture(scope="module")
def s3(shards):
    """The shards in a bucket of a real S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        import fsspec

        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        for path in shards.iterdir():
            write_file(f"s3://bucket/toy/{path.name}", path.read_bytes())
        yield "s3://bucket/toy"
    server.stop()


@pytest.fixture
def data(shards) -> bytes:
    return (shards / "toy-000000.tar").read_bytes()


def same(reader: ShardReader, local: ShardReader) -> None:
    assert [reader.load(i) for i in range(len(local))] == [local.load(i) for i in range(len(local))]
    assert reader.index_hash == local.index_hash


def used(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


# Transport


def test_a_range_is_exactly_what_was_asked_for_and_the_connection_is_kept(web, data):
    url = f"{web.url}/toy-000000.tar"
    for start, size in ((0, 1), (7, 5000), (len(data) - 3, 3), (9, 0)):
        assert read_range(url, start, size)[0] == data[start : start + size]
    assert read_range(url, 0, 10)[1] == info(url)[0] == len(data)
    assert read_file(url) == data
    assert web.connections == 1


@pytest.mark.parametrize("fault", [503, 429, 500, "slow", "short"])
def test_a_passing_fault_is_read_again(web, url, data, fault):
    web.faults = [fault, fault]
    assert read_range(url, 600, 100)[0] == data[600:700]
    assert len(web.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (503, "503|reduce|SlowDown|Unavailable"),
        ("slow", "(?i)time-?out"),
        ("short", "short read|[Pp]ayload"),
    ],
)
def test_a_lasting_fault_ends_in_one_sentence_with_url_attempts_and_reason(web, url, fault, reason):
    web.faults = [fault] * 9
    with pytest.raises(StorageError) as caught:
        read_range(url, 600, 100)
    start, _, last = str(caught.value).partition("; last: ")
    assert start.startswith(f"{url}: not read after 3 attempts in ") and re.search(reason, last), last
    assert len(web.requests) == 3


def test_a_server_that_is_not_there_is_told_by_name():
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9/x\.tar: not read after 3 attempts"):
        read_range("http://127.0.0.1:9/x.tar", 0, 1)


@pytest.mark.parametrize(("status", "match"), [(404, "not found"), (403, "the server refuses it|access denied")])
def test_what_no_attempt_can_mend_is_told_at_once(web, url, status, match):
    web.faults = [status]
    with pytest.raises(StorageError, match=f"toy-000000.tar: ({match})"):
        read_range(url, 0, 1)
    assert len(web.requests) == 1


def test_a_server_without_ranges_is_refused_at_once_and_its_answer_is_not_downloaded(web):
    web.ranges = False
    with pytest.raises(StorageError, match="does not support ranged reads"):
        read_range(f"{web.url}/toy-000000.tar", 600, 100)
    assert len(web.requests) == 1


def test_waits_double_and_are_bounded_and_the_server_may_ask_for_longer(web, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(storage, "policy", Policy(6, first_wait=1, longest_wait=5, read=1))
    monkeypatch.setattr(time, "sleep", waits.append)
    web.faults = [503] * 6
    with pytest.raises(StorageError):
        read_range(f"{web.url}/toy-000000.tar", 0, 1)
    for wait, longest in zip(waits, (1, 2, 4, 5, 5), strict=True):
        assert longest / 2 <= wait <= longest


def test_a_remote_file_that_is_shorter_than_needed_is_truncated(web, data):
    with pytest.raises(StorageError, match=f"truncated, it has {len(data)} bytes"):
        read_range(f"{web.url}/toy-000000.tar", len(data) - 5, 10)


def test_the_proxy_of_the_environment_is_used_unless_the_host_is_excepted(web, data, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    assert read_range("http://shards.invalid/toy-000000.tar", 5, 9)[0] == data[5:14]
    assert web.requests == [("http://shards.invalid/toy-000000.tar", "bytes=5-13")]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read_range(f"{web.url}/toy-000000.tar", 5, 9)[0] == data[5:14]
    assert web.requests[-1] == ("/toy-000000.tar", "bytes=5-13")


def test_an_address_that_pathlib_mangled_is_mended():
    assert storage.normalize(Path("https://host/folder/x.tar")) == "https://host/folder/x.tar"
    assert storage.normalize("s3://bucket/x") == "s3://bucket/x" and storage.normalize("/a//b") == "/a//b"


# Reading shards


@pytest.mark.parametrize("cached", [False, True])
def test_shards_over_http_equal_local_ones(web, shards, tmp_path, cached):
    reader = ShardReader(web.url, Cache(tmp_path / "cache", 1 << 20, 16 * KiB) if cached else None)
    same(reader, ShardReader(shards))
    assert all(path.endswith((".tar", "index.arrow")) for path, _ in web.requests)  # not one request per index


def test_http_lists_no_folder_so_a_list_or_names_serve(tmp_path, shards):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in shards.glob("toy-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    with serve(folder) as web:
        with pytest.raises(UserError, match=r"HTTP lists no folder, so it needs index.arrow .*shards.txt"):
            ShardReader(web.url)
        (folder / "shards.txt").write_text("toy-000000.tar\ntoy-000001.tar\ntoy-000002.tar\n")
        same(ShardReader(web.url), ShardReader(folder))
        same(ShardReader(f"{web.url}/toy-{{000000..000002}}.tar"), ShardReader(folder))
        (folder / "toy-000001.arrow").unlink()
        with pytest.raises(UserError, match=r"toy-000001.tar: has no index; run `medvlm shards index http"):
            ShardReader(web.url)


def test_remote_tars_that_cannot_be_written_beside_are_indexed_into_a_folder_of_ones_own(tmp_path, shards):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    with serve(folder) as web:
        urls = f"{web.url}/toy-{{000000..000002}}.tar"
        with pytest.raises(StorageError, match="HTTP cannot be written; give a folder of yours"):
            list(index_shards([urls]))
        lines = list(index_shards([urls], tmp_path / "mine"))
        assert lines[0] == f"{web.url}/toy-000000.tar: 10 samples" and len(lines) == 4
        same(ShardReader(tmp_path / "mine"), ShardReader(shards))


def test_a_shard_that_was_replaced_after_indexing_is_noticed(web, shards, tmp_path):
    for cache in (None, Cache(tmp_path / "cache", 1 << 20, 16 * KiB)):
        reader = ShardReader(web.url, cache)
        tar = shards / "toy-000002.tar"
        whole = tar.read_bytes()
        try:
            tar.write_bytes(whole + bytes(512))
            with pytest.raises(UserError, match=rf"toy-000002.tar: .*{len(whole) + 512} bytes.*{len(whole)}"):
                reader.load(23)
        finally:
            tar.write_bytes(whole)


def test_a_bit_that_flips_on_the_way_is_read_again_and_one_that_lasts_is_told(web, shards, tmp_path):
    for cache in (None, Cache(tmp_path / "cache", 1 << 20, 64 * KiB)):
        reader, local = ShardReader(web.url, cache), ShardReader(shards)
        row = reader.row(1)
        web.faults = ["flip"]
        if cache is None:
            assert reader.member(1, "json") == local.member(1, "json")
            web.faults = ["flip"] * 2
            with pytest.raises(UserError, match=f"toy-000000.tar:{row.key}.json: checksum differs"):
                reader.member(1, "json")
        else:
            same(reader, local)


def test_s3_shards_are_listed_read_and_indexed(s3, shards, tmp_path):
    same(ShardReader(s3, Cache(tmp_path, 1 << 20, 16 * KiB)), ShardReader(shards))
    same(ShardReader(f"{s3}/toy-{{000000..000002}}.tar"), ShardReader(shards))
    with pytest.raises(AbsentError, match="s3://bucket/toy/absent: not found"):
        read_range(f"{s3}/absent", 0, 1)
    for path in shards.glob("*.tar"):
        write_file(f"s3://bucket/raw/{path.name}", path.read_bytes())
    with pytest.raises(UserError, match="has no index"):
        ShardReader("s3://bucket/raw")
    assert list(index_shards(["s3://bucket/raw"]))[-1] == "s3://bucket/raw/index.arrow"
    same(ShardReader("s3://bucket/raw"), ShardReader(shards))
    write_file("s3://bucket/raw/toy-000003.tar", (shards / "toy-000000.tar").read_bytes())
    with pytest.warns(UserWarning, match="toy-000003.tar is not in it"), pytest.raises(UserError, match="has no index"):
        ShardReader("s3://bucket/raw")


PASSES = 8


def _load_all(reader: ShardReader, start, queue) -> None:
    start.wait()  # both at once
    queue.put([[reader.load(i)[0].key for i in range(len(reader))] for _ in range(PASSES)])


@pytest.mark.parametrize("where", ["http", "s3"])
def test_a_forked_worker_reads_beside_its_parent(where, web, s3):
    reader = ShardReader(web.url if where == "http" else s3)
    expected = [reader.load(i)[0].key for i in range(len(reader))]  # the parent has its connections open
    before = len(web.requests)
    context = multiprocessing.get_context("fork")
    queue, start = context.SimpleQueue(), context.Barrier(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        children = [context.Process(target=_load_all, args=(reader, start, queue)) for _ in range(2)]
        for child in children:
            child.start()
    assert [queue.get() for _ in children] == [[expected] * PASSES] * 2
    for child in children:
        child.join()
    assert reader.load(0)[0].key == expected[0]
    if where == "http":  # no answer went to another process: nothing was asked for twice
        assert len(web.requests) - before == 2 * PASSES * len(reader) + 1


# Cache


def test_a_cached_block_is_fetched_once(web, tmp_path, data):
    cache = Cache(tmp_path, 1 << 20, 4 * KiB)
    url = f"{web.url}/toy-000000.tar"
    for start, size in ((0, 10), (4090, 20), (100, 3000), (len(data) - 7, 7), (2000, 9000)):
        assert cache.read(url, start, size, len(data)) == data[start : start + size]
    blocks = [wanted for _, wanted in web.requests]
    assert len(blocks) == len(set(blocks))
    before = len(blocks)
    cache.read(url, 2000, 9000, len(data))
    assert len(web.requests) == before


def test_the_cache_never_exceeds_its_limit_and_keeps_what_was_read_last(web, tmp_path, data):
    cache = Cache(tmp_path, 16 * KiB, 4 * KiB)
    url = f"{web.url}/toy-000000.tar"
    assert len(data) > 32 * KiB
    for start in range(0, len(data), KiB):
        assert cache.read(url, start, min(KiB, len(data) - start), len(data)) == data[start : start + KiB]
        assert cache.read(url, 0, 5, len(data)) == data[:5]
        assert used(tmp_path) - len("16384") <= 16 * KiB
    assert sum(wanted == "bytes=0-4095" for _, wanted in web.requests) == 1


def _read_blocks(folder: Path, url: str, data: bytes, queue) -> None:
    cache = Cache(folder, 1 << 20, 4 * KiB)
    queue.put(all(cache.read(url, s, 100, len(data)) == data[s : s + 100] for s in range(0, len(data) - 100, 2000)))


def test_processes_that_share_a_cache_fetch_each_block_once(web, tmp_path, data):
    url = f"{web.url}/toy-000000.tar"
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        children = [context.Process(target=_read_blocks, args=(tmp_path, url, data, queue)) for _ in range(4)]
        for child in children:
            child.start()
    assert [queue.get() for _ in children] == [True] * 4
    for child in children:
        child.join()
    blocks = [wanted for _, wanted in web.requests]
    assert len(blocks) == len(set(blocks)) == -(-len(data) // (4 * KiB))


def test_a_cut_or_damaged_block_is_fetched_again(web, shards, tmp_path):
    reader, local = ShardReader(web.url, Cache(tmp_path, 1 << 20, 8 * KiB)), ShardReader(shards)
    same(reader, local)
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"):
        content = path.read_bytes()
        if content.startswith(b"ARROW1"):
            continue  # the index, which the reader has mapped
        path.write_bytes(content[:100] if len(content) % 2 else bytes(b ^ 255 for b in content))
    same(reader, local)


def test_a_cut_index_in_the_cache_is_fetched_again(web, shards, tmp_path):
    ShardReader(web.url, Cache(tmp_path, 1 << 20, 8 * KiB))
    (index,) = (p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock" and p.stat().st_size > 10)
    content = index.read_bytes()
    index.unlink()
    index.write_bytes(content[:500])
    same(ShardReader(web.url, Cache(tmp_path, 1 << 20, 8 * KiB)), ShardReader(shards))


def test_what_a_killed_writer_left_is_not_read_and_goes_when_room_is_needed(web, tmp_path, data):
    cache = Cache(tmp_path, 16 * KiB, 4 * KiB)
    url = f"{web.url}/toy-000000.tar"
    block = cache._path(url, "", 0)
    block.parent.mkdir()
    orphan = block.with_name(".part-" + block.name)
    orphan.write_bytes(b"half")
    for start in range(0, 30 * KiB, 4 * KiB):
        assert cache.read(url, start, 9, len(data)) == data[start : start + 9]
    assert not orphan.exists()


def test_another_content_of_the_same_address_is_another_entry(web, data, tmp_path):
    cache = Cache(tmp_path, 1 << 20, 8 * KiB)
    url = f"{web.url}/toy-000000.tar"
    for digest in ("one", "two", "one", "two"):
        assert cache.read(url, 0, 4, len(data), digest) == data[:4]
    assert len(web.requests) == 2


def test_a_cache_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(UserError, match="is too small; it needs 16777216"):
        Cache(tmp_path, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot hold a cache"):
        Cache(tmp_path / "file", 1 << 30)
