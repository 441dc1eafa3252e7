"""Shards straight into an object store: a real S3 server on this machine, over HTTP."""

import os
import signal
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from toy_archive import forked, make_archive, prepare, tree

from medvlm.errors import UserError

boto3 = pytest.importorskip("boto3")
server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive"), 30, rows=("gone,,train,p9",))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(endpoint, tmp_path, monkeypatch):
    """An empty bucket; what the program knows about the server stands in the environment alone."""
    values = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**values, "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # one that knows another module's server
    client = boto3.client("s3")
    name = "shards-" + sha256(str(tmp_path).encode()).hexdigest()[:12]
    client.create_bucket(Bucket=name)
    return Bucket(client, name)


class Bucket:
    def __init__(self, client, name: str):
        self.client, self.name, self.url = client, name, f"s3://{name}/sets/toy"

    def objects(self) -> dict[str, str]:
        """Name -> sha256, read with Amazon's own client."""
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name):
            for entry in page.get("Contents", []):
                body = self.client.get_object(Bucket=self.name, Key=entry["Key"])["Body"].read()
                found[entry["Key"].removeprefix("sets/toy/")] = sha256(body).hexdigest()
        return found

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [entry["Key"].removeprefix("sets/toy/") for entry in found]

    def times(self) -> dict[str, object]:
        found = self.client.list_objects_v2(Bucket=self.name)["Contents"]
        return {entry["Key"]: entry["LastModified"] for entry in found}


def test_a_bucket_holds_the_same_bytes_as_a_folder(archive, bucket, tmp_path):
    prepare(archive, tmp_path / "here")
    report = prepare(archive, bucket.url, workers=2)
    assert report["complete"] and bucket.objects() == tree(tmp_path / "here")
    before = bucket.times()
    assert prepare(archive, bucket.url, check=True)["shards"] == report["shards"]
    assert bucket.times() == before  # nothing is uploaded twice
    bucket.client.delete_object(Bucket=bucket.name, Key="sets/toy/train/toy_archive-000001.tar")
    assert prepare(archive, bucket.url)["complete"]
    assert bucket.objects() == tree(tmp_path / "here")


def test_parts_that_share_only_the_bucket(archive, bucket, tmp_path):
    reports = [prepare(archive, bucket.url, part=f"{i}/2", work=tmp_path / f"node{i}") for i in (1, 0)]
    assert [r["complete"] for r in reports] == [False, True]
    prepare(archive, tmp_path / "here")
    assert bucket.objects() == tree(tmp_path / "here")


def test_kill_9_while_uploading(archive, bucket, tmp_path):
    for count in (2, 9):  # of 18
        pid = forked(prepare, archive, bucket.url)
        while len(bucket.names()) < count:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert "dataset.json" not in bucket.names()
    prepare(archive, bucket.url)
    prepare(archive, tmp_path / "here")
    assert bucket.objects() == tree(tmp_path / "here")


def test_another_set_in_the_same_place_is_refused(archive, bucket):
    prepare(archive, bucket.url, part="0/2")
    with pytest.raises(UserError, match="samples_per_shard was 7 and is 5"):
        prepare(archive, bucket.url, samples_per_shard=5)


@pytest.mark.parametrize(
    ("url", "told"),
    [("s3://no-such-bucket/x", "no-such-bucket"), ("nonsense://x/y", "cannot be opened")],
)
def test_an_address_that_does_not_work_is_one_sentence(archive, bucket, url, told):
    with pytest.raises(UserError, match=told):
        prepare(archive, url)


def test_a_server_that_does_not_answer_is_one_sentence(archive, bucket, monkeypatch):
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"(?i)connect"):
        prepare(archive, "s3://somewhere/x")
    fsspec.filesystem("s3").clear_instance_cache()
