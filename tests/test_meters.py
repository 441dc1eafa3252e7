"""What a run says of its time, FLOPs and memory."""

import json
import types
from pathlib import Path

import pytest
import torch
from conftest import launch
from toy import make_recipe

from medvlm.config.load import load_recipe
from medvlm.data.loader import Encoded, collate
from medvlm.models.build import build_components, build_model
from medvlm.models.trainable import apply_trainable
from medvlm.objectives import gather
from medvlm.training import timers
from medvlm.training.families.llava import LLAVA
from medvlm.training.flops import PAIRS, CostRecorder
from medvlm.training.meters import Meters
from medvlm.training.trackers import Trackers


def test_a_run_measures_itself_on_all_ranks(world):
    options = {"data__packing": {"tokens": 256, "images": 4}, "data__cache_dir": str(world / "cache")}
    batch = {"training__micro_batch_size": 1, "training__global_batch_size": 4, "training__steps": 6}
    recipe = make_recipe(world, "measured", **options, **batch)
    output = launch(recipe, "--profile")
    assert "\nattention: varlen" in output and "kernels: torch (Liger needs a GPU)" in output
    assert "vision_tower attention: sdpa\noptimizer: AdamW, fused\n" in output
    assert "TFLOP/s a rank, measured: 1024 x 1024 matmul, float32" in output
    folder = world / "runs" / "measured"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert sum(row["phase_seconds"].values()) == pytest.approx(row["seconds"])
        assert all(row["phase_seconds"][name] > 0 for name in ("data", "forward", "backward", "optimizer"))
        assert 0 < row["communication_seconds"] < row["seconds"]
        assert 0 < row["mfu"] == row["hfu"] < 1 and row["peak_source"] == "measured"
        of_ranks = row["memory_gib_of_ranks"]
        assert row["memory_gib"] == max(of_ranks.values()) == of_ranks[str(row["memory_rank"])] > 0.1
        assert of_ranks.keys() == {"0", "1"}
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
        assert row["supervised_tokens_per_second"] == pytest.approx(row["supervised_tokens"] / row["seconds"])
    names = {event.get("name", "") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"aten::mm", "ProfilerStep#2", "ProfilerStep#4"} <= names and "ProfilerStep#5" not in names

    # a ZeRO-3 run counts what one process counts
    config = load_recipe(str(recipe))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    apply_trainable(model, config.model, parts.unused)
    recorder = CostRecorder(model, config.model.PARTS, LLAVA.unit, parts.unused)
    model(**collate([Encoded([7] * 9, [7] * 9)], 3, 32, True).inputs(torch.device("cpu")))
    costs = recorder.costs.parts
    language = costs["language_model"]
    for row in rows:
        found = {part: tera * 1e12 for part, tera in row["model_tflop"].items()}
        assert found["vision_tower"] == pytest.approx(costs["vision_tower"]["images"].model * row["images"])
        projected = costs["multi_modal_projector"]["images"].model * row["images"]
        assert found["multi_modal_projector"] == pytest.approx(projected)
        linear = language["tokens"].model * row["tokens"] + language["targets"].model * row["supervised_tokens"]
        assert linear < found["language_model"] <= linear + language[PAIRS, None].model * 256 * row["tokens"]


class Work(torch.distributed.Work):
    def wait(self):
        return "done"


def test_every_collective_and_every_wait_is_timed_once(monkeypatch):
    class Backend:
        def all_reduce(self, tensor):
            return tensor

        def all_gather_coalesced(self):  # made of others
            return self.all_reduce("inner")

        def all_gather_into_tensor(self):
            return Work()

    backend = Backend()
    monkeypatch.setattr(timers.comm, "cdb", backend)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, mine: "gathered")
    clock = iter(range(100))
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(clock))
    timer = timers.CommunicationTimer(torch.device("cpu"))
    assert backend.all_reduce("a") == "a"
    assert timer.read() == 1
    assert backend.all_gather_coalesced() == "inner"
    assert timer.read() == 1, "the inner one is part of the outer one"
    work = backend.all_gather_into_tensor()
    assert work.wait() == "done" and timer.read() == 2
    assert gather.dist.all_gather([], None) == "gathered" and timer.read() == 1, "a contrastive loss's own"
    timer.close()
    backend.all_reduce("b")
    gather.dist.all_gather([], None)
    assert timer.read() == 0


def test_cuda_spans_are_read_from_events(monkeypatch):
    class Event:
        count = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.count += 1
            self.at = Event.count

        def elapsed_time(self, end):
            return 500.0 * (end.at - self.at)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = timers.Timer(types.SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    for name in ("forward", "backward", "forward"):
        with timer(name):
            pass
    assert timer.read() == {"forward": 1.0, "backward": 0.5} and timer.read() == {}


def test_starvation_is_said_once_with_the_mend():
    starvation = timers.Starvation(workers=0, window=4)
    said = [starvation.warning(step, 0.3 if step > 2 else 9.0, 1.0) for step in range(1, 12)]
    (warning,) = filter(None, said)
    assert warning.startswith("steps 2 to 5 waited for data for") and "data.workers is 0" in warning
    assert not any(timers.Starvation(2, window=4).warning(step, 0.1, 1.0) for step in range(12))


def test_a_full_disk_at_the_start_leaves_the_metrics(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(file, text):
        with file.open("w"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            Meters(tmp_path, 1, 4, None)
    assert path.read_text().count("step") == 2
    Meters(tmp_path, 1, 4, Trackers(types.SimpleNamespace(run=types.SimpleNamespace(trackers=[])), 1)).close()
    assert path.read_text() == '{"step": 1}\n'
