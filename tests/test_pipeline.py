"""Archives into shards: the same bytes whatever happens, nothing lost, nothing hidden."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from conftest import REPO
from toy_archive import ARCHIVE, forked, make_archive, prepare, tree
from typer.testing import CliRunner

from data_prep import cli, executors, generic, pipeline, shard_task
from data_prep.items import Dropped, Item, Source
from data_prep.masking import drop_masked_turns
from data_prep.pipeline import PipelineOptions
from data_prep.planning import tables_digest
from medvlm.data.shards import MERGED, ShardReader, merge_index
from medvlm.errors import UserError


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_archive(tmp_path_factory.mktemp("archive"), rows=("gone,,train,p900", "bad,bad.png,train,p901"))


@pytest.fixture(scope="module")
def undisturbed(archive, tmp_path_factory) -> dict[str, str]:
    """The tree that every other way to make the set must give, with a file that is no image in it."""
    (archive / "bad.png").write_text("not an image")
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert prepare(archive, out)["complete"]
    return tree(out)


def test_shards_hold_what_the_table_says(archive, undisturbed, tmp_path):
    report = prepare(archive, tmp_path / "out")
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (train["samples"], train["patients"], train["studies"], train["images"], train["texts"]) == (
        48,
        24,
        48,
        48,
        48,
    )
    assert (test["samples"], test["patients"], test["shards"]) == (12, 6, 2)
    assert train["dropped"] == {"row without an image": 1, "unreadable image": 1} and train["quarantined"] == 1
    for split in ("train", "test"):  # merged from the shards' indexes as `medvlm shards index` merges them
        index = tmp_path / "out" / split / MERGED
        made = index.read_bytes()
        assert merge_index(index.parent) == index and index.read_bytes() == made
    reader = ShardReader(tmp_path / "out" / "train")
    assert [reader.key(i) for i in range(48)] == [f"k{i}" for i in range(60) if i % 10 < 8]
    sample = reader.sample(0)
    assert (sample.source, sample.license, sample.images[0].width) == ("toy_archive", "CC0-1.0", 16)
    listed = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(row["what"], row["split"]) for row in listed] == [("gone", "train"), ("bad.png", "train")]
    assert "unreadable image" in listed[1]["reason"]
    with tarfile.open(tmp_path / "out/train/toy_archive-000006.tar") as tar:
        assert len(tar.getnames()) == 12  # six samples of the last seven: one is in quarantine


def test_a_pool_gives_the_same_bytes(archive, undisturbed, tmp_path):
    assert prepare(archive, tmp_path / "out", workers=3)["complete"]
    assert tree(tmp_path / "out") == undisturbed


def test_parts_in_any_order_give_the_same_bytes(archive, undisturbed, tmp_path):
    reports = [prepare(archive, tmp_path / "out", part=f"{i}/5") for i in (3, 0, 4, 1, 2)]
    assert [r["complete"] for r in reports] == [False] * 4 + [True]
    assert tree(tmp_path / "out") == undisturbed


def test_parts_at_the_same_time_give_the_same_bytes(archive, undisturbed, tmp_path):
    parts = ["0/3", "1/3", "2/3", "2/3"]  # the last one twice, as a requeued job may be
    pids = [forked(lambda p=part: prepare(archive, tmp_path / "out", part=p)) for part in parts]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert tree(tmp_path / "out") == undisturbed


def test_more_parts_than_shards(archive, undisturbed, tmp_path):
    for i in range(12):
        prepare(archive, tmp_path / "out", part=f"{i}/12")
    assert tree(tmp_path / "out") == undisturbed


def test_kill_9_at_random_moments_changes_nothing(archive, undisturbed, tmp_path):
    rng = random.Random(0)
    killed = 0
    for n in range(12):  # a whole run may take as little as a tenth of a second
        pid = forked(prepare, archive, tmp_path / "out")
        time.sleep(rng.uniform(0.002, 0.02) * (n + 1))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if (tmp_path / "out/dataset.json").exists():
            break
    assert killed >= 1
    prepare(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == undisturbed


def _run_and_die(step: int, source: Path, out: Path) -> None:
    """Run until the step-th call that makes something durable, then kill -9 this process just before or after it."""
    calls = itertools.count()

    def dying(function):
        def call(*arguments, **keywords):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    prepare(source, out, samples_per_shard=6)


def test_kill_9_at_each_step_of_writing_changes_nothing(tmp_path):
    source = make_archive(tmp_path / "archive", 8)
    prepare(source, tmp_path / "undisturbed", samples_per_shard=6)
    wanted = tree(tmp_path / "undisturbed")
    for step in itertools.count():
        out = tmp_path / f"out-{step}"
        status = os.waitpid(forked(_run_and_die, step, source, out), 0)[1]
        if not os.WIFSIGNALED(status):
            break
        prepare(source, out, samples_per_shard=6)
        assert tree(out) == wanted, f"killed at step {step}"
    assert step > 20 and status == 0


def test_what_is_finished_is_not_made_again(archive, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(archive, out)
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    def never(*_):
        raise AssertionError("a finished shard is made again")

    monkeypatch.setattr(shard_task, "make_shard", never)
    assert prepare(archive, out)["splits"]["train"]["samples"] == 48
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times


@pytest.mark.parametrize(("damage", "options"), [("cut", {}), ("flip", {"check": True}), ("delete", {})])
def test_a_damaged_shard_is_made_again(archive, undisturbed, tmp_path, damage, options):
    out = tmp_path / "out"
    prepare(archive, out)
    tar = out / "train/toy_archive-000003.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.unlink() if damage == "delete" else tar.write_bytes(data[:-512] if damage == "cut" else data)
    prepare(archive, out, **options)
    assert tree(out) == undisturbed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples_per_shard": 8}, "samples_per_shard was 7 and is 8"),
        ({"answer": "no"}, "options was"),
        ({"mask": "mask"}, "mask was 'report' and is 'mask'"),
    ],
)
@pytest.mark.parametrize("part", [None, "0/2"])
def test_other_options_are_refused(archive, tmp_path, options, told, part):
    prepare(archive, tmp_path / "out", part=part)
    with pytest.raises(UserError, match=told):
        prepare(archive, tmp_path / "out", part=part, **options)


def test_a_changed_table_is_refused(tmp_path):
    source = make_archive(tmp_path / "archive", 6)
    prepare(source, tmp_path / "out")
    with (source / "table.csv").open("a") as file:
        file.write("\nk9,3.png,train,p1")
    with pytest.raises(UserError, match="tables of the archive have changed"):
        prepare(source, tmp_path / "out")


def test_what_is_written_into_the_archive_is_not_a_change_of_it(tmp_path):
    source = make_archive(tmp_path / "archive", 30)
    assert not prepare(source, source / "shards", part="0/2")["complete"]
    assert prepare(source, source / "shards")["complete"]


def test_tables_elsewhere_and_deep_ones_count(tmp_path):
    """Of `generic --table`, and CT-RATE's in dataset/*/."""
    source, table = tmp_path / "archive", tmp_path / "reports.csv"
    for path in (source / "dataset/metadata/m.csv", table, source / "out/own.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    given = {"others": [table], "deep": ["dataset/*/*.csv"], "out": str(source / "out")}
    before = tables_digest(source, **given)
    (source / "out/own.json").write_text("aa")
    assert tables_digest(source, **given) == before
    for path in (table, source / "dataset/metadata/m.csv"):
        path.write_text("aa")
        assert tables_digest(source, **given) != before
        before = tables_digest(source, **given)


def test_a_table_that_an_option_names_counts(tmp_path):
    source, table = tmp_path / "archive", tmp_path / "reports.csv"
    source.mkdir()
    found = set()
    for text in ("image\na.png\n", "image\na.png\nb.png\n"):
        table.write_text(text)
        job = pipeline._Job(generic.CONVERTER, source, str(tmp_path / "out"), PipelineOptions(), {"table": table})
        found.add(job.fingerprint["tables"])
    assert len(found) == 2


def test_a_folder_with_other_shards_is_refused(archive, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/other-000000.tar").touch()
    with pytest.raises(UserError, match="already holds shards such as train/other-0"):
        prepare(archive, tmp_path)


def test_a_duplicate_key_names_both(tmp_path):
    source = make_archive(tmp_path / "archive", 30, rows=("k3,29.png,train,p1",))
    with pytest.raises(UserError, match=r"'k3' occurs twice: \(train, 3.png\) and \(train, 29.png\)"):
        prepare(source, tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_a_patient_in_two_splits_is_refused_unless_allowed(tmp_path):
    source = make_archive(tmp_path / "archive", 20, rows=("x,3.png,test,p1", "y,4.png,test,p2", "z,5.png,test,p77"))
    with pytest.raises(UserError, match=r"2 of 11 patients .* 'p1' in train and test"):
        prepare(source, tmp_path / "out")
    report = prepare(source, tmp_path / "out", allow_leak=True)
    assert report["groups_in_two_splits"] == 2
    with pytest.raises(UserError, match="2 patients are in two splits"):
        prepare(source, tmp_path / "out")


def test_max_bad_counts_all_parts_and_keeps_what_is_done(tmp_path):
    source = make_archive(tmp_path / "archive", 180)
    for i in (*range(100, 110), *range(150, 154)):
        (source / f"{i}.png").write_bytes(b"\x89PNG broken")
    prepare(source, tmp_path / "out", samples_per_shard=60, part="0/2", max_bad=0.1)  # rows 0-74 and 150-179
    with pytest.raises(UserError, match=r"12 of the 144 samples seen so far are bad.*12 x unreadable image"):
        prepare(source, tmp_path / "out", samples_per_shard=60, part="1/2")
    assert len(list((tmp_path / "out/train").glob("*.tar"))) >= 2 and not (tmp_path / "out/dataset.json").exists()
    report = prepare(source, tmp_path / "out", samples_per_shard=60, max_bad=0.1)
    assert report["complete"] and sum(row["quarantined"] for row in report["splits"].values()) == 14


def test_quarantined_samples_are_tried_again_when_asked(tmp_path):
    source = make_archive(tmp_path / "archive", 20)
    data = (source / "5.png").read_bytes()
    (source / "5.png").unlink()
    assert prepare(source, tmp_path / "out")["splits"]["train"]["quarantined"] == 1
    (source / "5.png").write_bytes(data)
    assert prepare(source, tmp_path / "out")["splits"]["train"]["quarantined"] == 1
    assert prepare(source, tmp_path / "out", retry_quarantined=True)["splits"]["train"]["quarantined"] == 0
    prepare(source, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_set_of_bad_files_alone_is_an_error(tmp_path):
    source = make_archive(tmp_path / "archive", 4)
    for path in source.glob("*.png"):
        path.write_text("no")
    with pytest.raises(UserError, match=r"every sample was quarantined: 4 x unreadable image; the first is 0.png"):
        prepare(source, tmp_path / "out")


def _kill_at_the_pipe(out: Path, pipe: Path, stop: threading.Event, picture: bytes | None) -> None:
    """Kill -9 each worker that reads ``pipe``; a ``picture`` takes its place after the first."""
    while not stop.wait(0.01):
        for crumb in out.glob(".work/tmp/train-*/at"):
            if crumb.read_bytes() == (3).to_bytes(8, "little"):
                if picture is not None:
                    pipe.unlink(missing_ok=True)
                    pipe.write_bytes(picture)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(crumb.parent.name.rpartition(".")[2]), signal.SIGKILL)
                if picture is not None:
                    return


@pytest.mark.parametrize("always", [True, False])
def test_a_killed_worker(tmp_path, always):
    """A file that always kills its process is quarantined; one kill is a sentence, and a restart goes on."""
    source, stop = make_archive(tmp_path / "archive", 16), threading.Event()
    pipe = source / "3.png"
    picture = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)  # who reads it waits, and is killed
    arguments = (tmp_path / "out", pipe, stop, None if always else picture)
    killer = threading.Thread(target=_kill_at_the_pipe, args=arguments)
    killer.start()
    try:
        if always:
            report = prepare(source, tmp_path / "out", workers=2)
            assert report["splits"]["train"]["dropped"] == {"reading it killed the process": 1}
            assert '"key": "k3"' in (tmp_path / "out/quarantine.jsonl").read_text()
        else:
            with pytest.raises(UserError, match=r"a worker process was killed.*out of memory; start again with fewer"):
                prepare(source, tmp_path / "out", workers=2)
            prepare(source, tmp_path / "out")
            prepare(source, tmp_path / "undisturbed")
            assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")
    finally:
        stop.set()
        killer.join()


def test_workers_die_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\nfrom data_prep.executors import run_pool\n"
        "def work(n):\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    list(run_pool(work, [1], 1))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end and _running(worker):
        time.sleep(0.05)
    assert not _running(worker)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "-1/2", "1/2/3", "0/0"])
def test_a_wrong_part_is_explained(part):
    with pytest.raises(UserError, match="0 <= i < n"):
        PipelineOptions(part=part)


def test_text_is_scanned_and_masked(tmp_path):
    source = make_archive(tmp_path / "archive", 10)
    answer = "No effusion. Dr. John Smith was called at 555-123-4567."
    report = prepare(source, tmp_path / "report", answer=answer)
    assert sum(report["masked"].values()) >= 20 and report["mask"] == "report"
    assert "Smith" in ShardReader(tmp_path / "report/train").sample(0).messages[1].text
    report = prepare(source, tmp_path / "mask", answer=answer, mask="mask")
    assert sum(report["masked"].values()) >= 20
    # a model must not learn the mask: the sentence that holds it goes
    assert ShardReader(tmp_path / "mask/train").sample(0).messages[1].text == "No effusion."
    assert prepare(source, tmp_path / "off", answer=answer, mask="off")["masked"] == {}


def test_turns_of_which_only_masks_are_left_go_and_images_stay():
    turns = [("user", "<image> who?"), ("assistant", "___."), ("user", "effusion?"), ("assistant", "Yes. Seen by ___.")]
    fields = {"key": "k", "messages": [{"role": role, "content": text} for role, text in turns]}
    kept, dropped = drop_masked_turns(fields)
    assert dropped == 1
    assert [m["content"] for m in kept["messages"]] == ["<image>\neffusion?", "Yes."]
    with pytest.raises(ValueError, match="no usable answer"):
        drop_masked_turns({"key": "k", "messages": fields["messages"][:2]})


def test_a_decoder_bug_is_quarantined_with_its_reason(tmp_path, monkeypatch):
    def broken(source, *_):
        raise IndexError("list index out of range")

    monkeypatch.setattr(shard_task, "encode_source", broken)
    source = make_archive(tmp_path / "archive", 3)
    with pytest.raises(UserError, match="3 x the decoder failed"):
        prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"key": "a b", "split": "train"}, "key may hold only"),
        ({"key": "ok", "split": "dev"}, "split is none of"),
        ({"key": "ok", "split": "train", "messages": [], "report": {}}, "nothing to learn from"),
        ({"key": "ok", "split": "train", "labels": {"Edema": 3}}, "labels.Edema"),
    ],
)
def test_a_wrong_item_is_counted_not_fatal(tmp_path, fields, reason):
    good = {"key": "good", "split": "train", "messages": [{"role": "assistant", "content": "yes"}]}
    converter = replace(ARCHIVE, items=lambda source: iter([Item(good), Item({"report": {"a": "b"}, **fields})]))
    report = pipeline.run(converter, tmp_path, tmp_path / "out", PipelineOptions(workers=0, progress=False))
    [listed] = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    assert report["splits"]["train"]["samples"] == 1 and reason in json.loads(listed)["reason"]


def test_an_archive_without_samples_says_what_was_dropped(tmp_path):
    converter = replace(ARCHIVE, items=lambda source: iter([Dropped("a", "no report"), Dropped("b", "no report")]))
    with pytest.raises(UserError, match=r"gives no sample \(dropped: 2 x no report"):
        pipeline.run(converter, tmp_path, tmp_path / "out", PipelineOptions(workers=0))


def test_every_source_option_reaches_the_worker(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(shard_task, "encode_source", lambda source, *rest: given.append(source) or 1 / 0)
    source = Source("a.nii", "nifti", "id", "PA", {"a": 1}, {"slope": 2.0, "windows": [[40.0, 400.0]]})
    item = Item({"key": "k", "split": "train"}, [source])
    converter = replace(ARCHIVE, items=lambda source: iter([item]))
    with pytest.raises(UserError, match="every sample"):
        pipeline.run(converter, tmp_path, tmp_path / "out", PipelineOptions(workers=0, progress=False))
    assert given == [source]


def test_the_pool_keeps_few_tasks_in_flight():
    taken = []

    def tasks():
        for n in range(40):
            taken.append(n)
            yield n

    for count, _ in enumerate(executors.run_pool(abs, tasks(), 1), 1):
        assert len(taken) <= count + 2
    assert count == 40


# --- the command line


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command("toy")(cli.command(ARCHIVE))
    app.callback()(lambda: None)
    return app


def test_the_command_has_the_options_of_converter_and_pipeline(tmp_path):
    source = make_archive(tmp_path / "archive", 10)
    arguments = ["toy", str(source), str(tmp_path / "out"), "--answer", "no", "--samples-per-shard", "4"]
    done = CliRunner().invoke(_app(), [*arguments, "--workers", "0", "--short-side", "8", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["splits"]["train"]["shards"] == 2 and report["made_with"]["pixels"]["short_side"] == 8
    sample = ShardReader(tmp_path / "out/train").sample(0)
    assert sample.messages[1].text == "no" and sample.images[0].height == 8


def test_the_table_shows_counts_and_reasons(tmp_path):
    source = make_archive(tmp_path / "archive", 10, rows=("gone,,train,p900",))
    done = CliRunner(env={"COLUMNS": "160"}).invoke(
        _app(), ["toy", str(source), str(tmp_path / "out"), "--workers", "0"]
    )
    assert done.exit_code == 0, done.output
    assert "train: 1 dropped, row without an image" in done.stdout and "toy_archive (CC0-1.0)" in done.stdout
    assert f"{tmp_path}/out/quarantine.jsonl" in done.stdout


def test_an_option_of_the_pipeline_cannot_be_a_converters():
    def items(source: Path, workers: int = 1):
        yield from ()

    with pytest.raises(TypeError, match="workers"):
        cli.command(replace(ARCHIVE, items=items))


def test_commands_are_listed_without_heavy_imports():
    code = (
        "import sys, typer; from data_prep import cli; app = typer.Typer(); cli.register(app)\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydicom', 'nibabel', 'pyarrow', 'numpy', 'webdataset', 'cv2', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in ("mimic-cxr", "radfm", "generic", "phantom", "tokenizer", "deidentify"))


def test_a_listed_command_is_loaded_when_it_is_called():
    app = typer.Typer()
    cli.register(app)
    done = CliRunner().invoke(app, ["phantom", "--help"])
    assert done.exit_code == 0 and "--preset" in done.output
