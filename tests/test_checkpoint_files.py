"""Checkpoints as files: written in the background, checked, pruned, consolidated, locked."""

import fcntl
import json
import shutil
from pathlib import Path

import hooks
import pytest
import torch
from conftest import launch, medvlm, two_ranks
from safetensors.torch import load_file
from toy import make_recipe

from medvlm.errors import UserError
from medvlm.training import checkpoint
from medvlm.training.checkpoint.folder import checkpoints


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def kept(world) -> Path:
    """A run of six steps with a checkpoint at each, of which some stay."""
    options = {"checkpoint_every": 1, "keep_checkpoints": 2, "keep_every": 3, "steps": 6, "zero": "zero2"}
    launch(make_recipe(world, "kept", **{f"training__{key}": value for key, value in options.items()}))
    return world / "runs" / "kept"


@pytest.fixture
def run(kept, world, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(kept, tmp_path / "runs" / "kept")
    text = (world / "kept.yaml").read_text().replace(str(world / "runs"), str(tmp_path / "runs"))
    (tmp_path / "kept.yaml").write_text(text)
    return tmp_path / "runs" / "kept"


def resume_of(run: Path, *arguments: str, **options) -> str:
    return launch(run.parent.parent / "kept.yaml", *arguments, **options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_the_newest_checkpoints_and_those_at_multiples_stay(kept):
    assert names(kept) == ["step-00000003", "step-00000005", "step-00000006"]


def test_prune_removes_old_ones_and_never_the_last(run):
    done = json.loads(medvlm("checkpoint", "prune", run, "--keep", 1, "--json"))
    assert done["removed"] == ["step-00000003", "step-00000005"] and names(run) == done["kept"] == ["step-00000006"]
    (run / "checkpoints" / "step-00000006" / "medvlm.json").unlink()
    output = medvlm("checkpoint", "prune", run, "--after", "step-00000005", status=2)
    assert "no complete checkpoint step-00000005" in output and names(run) == ["step-00000006"]


def test_a_flipped_byte_is_found_and_the_way_back_is_named(run):
    before = rows(run)
    file = run / "checkpoints" / "step-00000006" / "rank-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    found = json.loads(medvlm("checkpoint", "verify", run, "--json", status=1).splitlines()[0])
    assert [bool(row["problem"]) for row in found] == [False, False, True] and file.name in found[2]["problem"]
    output = resume_of(run, fails=True)
    assert output.count("medvlm: error:") == 1 and "Traceback" not in output
    command = f"medvlm checkpoint prune {run} --after step-00000005"
    assert f"{file.name} has checksum" in output and command in output
    medvlm(*command.split()[1:])
    resume_of(run, "run.resume=require")
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in before]


@pytest.mark.parametrize("name", ["rank-00000-of-00002.safetensors", "medvlm.json", "frozen"])
def test_a_half_deleted_checkpoint_is_never_passed_over(run, name):
    folder = run / "checkpoints" / "step-00000006"
    if name == "frozen":  # what no feature depends on is frozen, and stored once for all of them
        shutil.rmtree(next((run / "checkpoints").glob("frozen-*")))
        message = "no complete checkpoint is left before it"
    else:
        (folder / name).unlink()
        message = f"prune {run} --after step-00000005"
    output = resume_of(run, fails=True)
    assert "is missing" in output and message in output and "Traceback" not in output


MANIFESTS = {
    "cut off": (lambda text: text[:200], "its medvlm.json is damaged (Expecting value"),
    "a byte": (lambda text: text.replace('"world_size": 2', '"world_size": 3'), "damaged (its checksum is"),
    "another step's": (lambda text: text.replace('"step": 6', '"step": 5'), "damaged (its checksum is"),
    "no files": (lambda text: '{"format": 1}', "damaged (it lists no files)"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_found_and_the_way_back_is_named(run, damage):
    change, said = MANIFESTS[damage]
    file = run / "checkpoints" / "step-00000006" / "medvlm.json"
    file.write_text(change(file.read_text()))
    found = json.loads(medvlm("checkpoint", "verify", run, "--json", status=1).splitlines()[0])
    assert [bool(row["problem"]) for row in found] == [False, False, True] and said in found[2]["problem"]
    output = resume_of(run, fails=True)
    command = f"medvlm checkpoint prune {run} --after step-00000005"
    assert said in output and command in output and "Traceback" not in output
    assert json.loads(medvlm("checkpoint", "prune", run, "--keep", 1, "--json"))["removed"] == ["step-00000003"]
    medvlm(*command.split()[1:])
    assert names(run) == ["step-00000005"]


def test_a_checkpoint_under_another_name_or_of_an_early_version(run):
    folder = run / "checkpoints" / "step-00000006"
    record = json.loads((folder / "medvlm.json").read_text())
    del record["crc32"]
    (folder / "medvlm.json").write_text(json.dumps(record))
    assert checkpoint.newest(run) == folder, "without a checksum of its own"
    folder.rename(folder.with_name("step-00000007"))
    with pytest.raises(UserError, match=r"its medvlm.json is that of step 6; .* --after step-00000005"):
        checkpoint.newest(run)
    record["format"] = 2
    (folder.with_name("step-00000007") / "medvlm.json").write_text(json.dumps(record | {"step": 7}))
    with pytest.raises(UserError, match="was written in checkpoint format 2"):
        checkpoint.read_manifest(checkpoint.newest(run))


def test_what_cannot_be_pruned_is_said_and_training_goes_on(run):
    hook = {"script": hooks.SCRIPT, "RUN": str(run), "HOOK": "medvlm.training.checkpoint.saving:prune 1 0 leave"}
    said = resume_of(run, "training.steps=8", "--allow-change", **hook)
    assert "warning: an old checkpoint could not be removed: [Errno 28]" in said
    assert names(run) == ["step-00000003", "step-00000006", "step-00000007", "step-00000008"]
    assert not list((run / "checkpoints").glob("*.partial")), "with the next checkpoint, what was left is removed"


def test_ranks_that_see_other_checkpoints_wait_for_each_other_and_do_not_start_otherwise(run, tmp_path):
    for step, seen in ((7, "nothing"), (8, "wrong")):  # not yet there; there in part
        late = {"script": hooks.SCRIPT, "HOOK": f"medvlm.training.checkpoint:to_resume 1 1 {seen}"}
        assert f"finished at step {step}" in resume_of(run, f"training.steps={step}", "--allow-change", **late)
    script = tmp_path / "impatient.py"
    script.write_text(
        "import runpy\n"
        "from medvlm.training import setup\n"
        "setup.PATIENCE = 0\n"
        f"runpy.run_path({hooks.SCRIPT!r}, run_name='__main__')\n"
    )
    never = {"script": str(script), "HOOK": "medvlm.training.checkpoint:to_resume 0 1 nothing"}
    said = resume_of(run, fails=True, **never)
    assert "its newest checkpoint is step-00000008 to rank 0 and none to rank 1" in said
    assert said.count("medvlm: error:") == 1 and "Traceback" not in said


def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(run):
    for name in ("step-00000009.partial", "frozen-1.partial"):
        (run / "checkpoints" / name).mkdir()
    resume_of(run, ranks=1)
    assert not list((run / "checkpoints").glob("*.partial"))


def test_leftovers_are_told_from_what_other_ranks_are_writing(tmp_path):
    """Rank 0 looks for them after a checkpoint, when another rank may be at work on the next."""
    places = [tmp_path / "checkpoints" / f"{name}.partial" for name in ("step-00000003", "step-00000008", "frozen-1")]
    for place in places:
        place.mkdir(parents=True)
    checkpoint.clean(tmp_path, before=6)
    assert [place.exists() for place in places] == [False, True, True]
    checkpoint.clean(tmp_path)
    assert not any(place.exists() for place in places)


def test_two_runs_in_one_folder_are_refused(run):
    with (run / ".lock").open("a") as file:
        file.write(" of another test")
        file.flush()
        fcntl.lockf(file, fcntl.LOCK_EX)
        output = resume_of(run, ranks=1, fails=True)
        pruning = medvlm("checkpoint", "prune", run, "--keep", 1, status=2)
    assert "another run is at work in it (process" in output and "another run is at work" in pruning


def test_inspect_tells_what_is_in_a_checkpoint(kept):
    found = json.loads(medvlm("checkpoint", "inspect", kept, "--json"))
    assert (found["step"], found["world_size"], found["zero_stage"]) == (6, 2, 2)
    assert found["stored"] == {"param": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"}
    # by hand: embedding and head 320 x 32, two layers of q, o 32 x 32, k, v 16 x 32, three 64 x 32, two norms; a norm
    language = 2 * 320 * 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 2048 + 64) + 32
    assert found["parts"]["language_model"] == {"parameters": language, "trained": language}
    assert "language_model" in medvlm("checkpoint", "inspect", kept / "checkpoints" / "step-00000003")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_consolidate_writes_what_hugging_face_tools_read(kept, tmp_path, dtype):
    out = tmp_path / "whole"
    done = json.loads(
        medvlm("checkpoint", "consolidate", kept, "--out", out, "--dtype", dtype, "--shard-gib", 0.0001, "--json")
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    whole = {key: value for name in files for key, value in load_file(out / name).items()}
    assert len(files) > 1 and index["metadata"]["total_size"] == done["bytes"]
    expected = checkpoint.consolidate(checkpoint.newest(kept))
    assert whole.keys() == set(expected)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert all(torch.equal(whole[name], expected[name].to(kind)) for name in whole)


@pytest.mark.parametrize("stage", [2, 3])
def test_consolidated_weights_equal_those_of_deepspeed_s_own_tool(world, tmp_path, stage):
    """Both checkpoints are written by one engine in bf16, with a frozen part."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    name = f"both{stage}"
    options = {"training__precision": "bf16", "model__vision_tower__train": "frozen"}
    recipe = make_recipe(world, name, training__zero=f"zero{stage}", **options)
    two_ranks(
        f"""
        from medvlm.config.load import load_recipe
        from medvlm.training import checkpoint, distributed, setup, step
        from medvlm.training.guard import Guard

        distributed.start()
        session = setup.start(load_recipe({str(recipe)!r}))
        loader = step.batches_from(session, [0])
        batches = [next(loader) for _ in range(session.accumulation)]
        counts = step.exchange_counts(batches, None, False)
        step.update(session, 0, batches, counts, Guard(session.run, session.config.training, 0))
        checkpoint.save(session.engine, session.run, 1, session.manifest, 1)
        session.engine.save_checkpoint({str(tmp_path)!r}, tag="its")
        """,
        tmp_path,
    )
    its = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="its")
    ours = checkpoint.consolidate(checkpoint.newest(world / "runs" / name))
    assert set(ours) == its.keys()
    for key, value in ours.items():
        assert torch.equal(value, its[key].float()), key


def test_a_checkpoint_written_while_training_goes_on_holds_its_own_step(world, tmp_path):
    """Rank 1 writes its file of step 1 when step 3 is done: none waits for it, and nothing later is in it."""
    options = {"training__checkpoint_every": 1, "training__steps": 4, "training__keep_checkpoints": 4}
    slow, quick = (make_recipe(world, name, **options) for name in ("slow", "quick"))
    launch(quick, "training.stop_after=1")
    output = two_ranks(
        f"""
        import json, threading
        from medvlm.config.load import load_recipe
        from medvlm.training import distributed, loop
        from medvlm.training.checkpoint import saving

        done, write, update = threading.Event(), saving.write_safetensors, loop.update

        def late(path, entries, metadata):
            if distributed.rank() == 1 and "step-00000001" in str(path):
                assert done.wait(60), "training waits for the checkpoint"
            return write(path, entries, metadata)

        def counted(session, step, *rest):
            values = update(session, step, *rest)
            if step == 2:
                done.set()
            return values

        saving.write_safetensors, loop.update = late, counted
        distributed.start()
        config = load_recipe({str(slow)!r}, ["training.checkpoint_every=100"])
        save = saving.Saver.save

        def only_once(self, step):
            if step in (1, 4):
                save(self, step)

        saving.Saver.save = only_once
        config.training.checkpoint_every = 1
        print(json.dumps({{"status": loop.train(config)}}), flush=True)
        """,
        tmp_path,
    )
    assert [row["status"] for row in output] == [0, 0]
    a, b = (checkpoint.consolidate(checkpoints(world / "runs" / name)[0]) for name in ("slow", "quick"))
    assert a.path.name == b.path.name == "step-00000001"
    assert all(torch.equal(a[key], b[key]) for key in a)
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, shape in a.shapes.items():
            if name in a and kind in a.trained.stored.get(name, {}):
                left, right = (w.trained.tensor(kind, name, 0, shape.numel()) for w in (a, b))
                assert torch.equal(left, right)


def test_consolidating_needs_memory_for_one_tensor(tmp_path):
    """Eight tensors of 64 MiB, in two ranks' files: twice one of them is enough."""
    (row,) = two_ranks(
        f"""
        import json, os
        from pathlib import Path
        import torch
        from medvlm.training import distributed
        from medvlm.training.checkpoint import files, folder, report

        distributed.start()
        run = Path({str(tmp_path)!r})
        source, n = run / "checkpoints" / "step-00000001.partial", 2**24
        source.mkdir(parents=True)
        names = [f"language_model.{{i}}" for i in range(8)]
        written = {{}}
        for rank in range(2):
            entries = [files.Entry(f"param:{{k}}", torch.float32, (n // 2,), lambda: [torch.ones(n // 2)])
                       for k in names]
            starts = json.dumps({{k: rank * n // 2 for k in names}})
            metadata = {{"starts": starts, "scalars": "{{}}", "layouts": "{{}}"}}
            name = folder.rank_file(rank, 2)
            written[name] = files.write_safetensors(source / name, entries, metadata)
        record = {{"format": folder.FORMAT, "step": 1, "files": written, "config": {{}},
                  "frozen": {{"origin": {{}}, "folder": None}},
                  "parameters": {{k: {{"shape": [n], "stored": "trained"}} for k in names}}}}
        folder.complete(source, record)

        def memory(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        done = report.consolidate_to(run, run / "out", "fp32", 1.0)
        print(json.dumps({{"bytes": done["bytes"], "peak": memory("VmHWM") - before}}), flush=True)
        """,
        tmp_path,
        ranks=1,
    )
    assert row["bytes"] == 8 * 2**26 and row["peak"] < 128, row
