"""What a plan predicts, against what real ranks take, DeepSpeed's own shards and arithmetic."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPO, medvlm, refused_for_memory, two_ranks
from toy import make_recipe, make_world
from zygote import zygote

from medvlm.config.load import deepspeed_config_path
from medvlm.planning import fake
from medvlm.planning.step_time import Rates, seconds


@pytest.fixture(scope="module")
def toy_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("planning"))


def test_memory_of_a_real_step_is_predicted_within_a_tenth():
    cases = ["zero2 fp32", "zero3 fp32"]
    done = zygote().run(["--small", *cases], script=str(REPO / "benchmarks" / "memory.py"), timeout=900)
    assert done.returncode == 0, done.stderr[:4000]
    rows = [list(map(str.strip, line.split("|"))) for line in done.stdout.strip().splitlines()[2:]]
    assert [row[1] for row in rows] == cases
    for _, case, parameters, predicted, measured, *_ in rows:
        assert int(parameters.split()[0]) > 20
        assert float(predicted) == pytest.approx(float(measured), rel=0.1), case


def test_plan_lists_stages_recommends_one_that_fits_and_scales(toy_world, tmp_path):
    recipe = make_recipe(toy_world, training__precision="bf16", training__steps=100)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from medvlm import cli\n"
        "from medvlm.planning import plan\n"
        'plan.MODES, plan.SCALES = ("zero2", "zero3_offload"), (64,)\n'  # the others would only take time
        f'sys.argv = ["medvlm", "plan", {str(recipe)!r}, "--gpus", "2", "--gpu-memory", "2.1", "--json"]\n'
        "cli.main()\n"
    )
    done = zygote().run([], script=str(script), timeout=900)
    assert done.returncode == 0, done.stderr[:4000]
    made = json.loads(done.stdout)
    options = {(o["zero"], o["micro_batch_size"]): o for o in made["options"]}
    assert set(options) == {(zero, micro) for zero in ("zero2", "zero3_offload", "zero3") for micro in (1, 2, 4)}
    assert not options["zero2", 2]["fits"], "two buckets of 5e8 bf16 gradients are 1.86 GiB, beside 1 GiB of CUDA"
    assert made["recommended"] in [o for o in made["options"] if o["fits"]]
    assert options["zero3_offload", 2]["host"] > 0 == options["zero2", 2]["host"]
    assert [row["gpus"] for row in made["scaling"]] == [2, 64]
    assert made["gpu_hours"] == pytest.approx(100 * made["recommended"]["step_seconds"] * 2 / 3600)


A_VIEW_BY = {
    "slice": lambda t: t[1:7:2],
    "split": lambda t: t.split(3)[1],
    "select": lambda t: t.select(1, 2),
    "as_strided": lambda t: t.as_strided((4, 3), (6, 2), 1),
    "view": lambda t: t.view(6, 8),
    "detach": lambda t: t.detach(),
    "t": lambda t: t.t(),
    "transpose": lambda t: t.transpose(0, 1),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "alias": lambda t: torch.ops.aten.alias(t),
}


@pytest.mark.parametrize("name", A_VIEW_BY)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_view_is_cut_as_pytorch_cuts_it_and_takes_no_memory(name, device):
    assert {op._overloadpacket.__name__ for op in fake.VIEWS} == A_VIEW_BY.keys(), "each has a case"
    real = A_VIEW_BY[name](torch.zeros(8, 6, dtype=torch.bfloat16))
    count = fake.Count()
    with fake.fake_tensors() as mode, count:
        whole = torch.zeros(8, 6, dtype=torch.bfloat16, device=device, requires_grad=True)
        out = A_VIEW_BY[name](whole)
        assert count.total == {device: 8 * 6 * 2} and out.fake_mode is mode
        assert (out.shape, out.stride(), out.storage_offset()) == (real.shape, real.stride(), real.storage_offset())
        assert (out.dtype, out.device.type) == (real.dtype, device)
        assert out.untyped_storage()._cdata == whole.untyped_storage()._cdata
        if out.requires_grad:
            out.sum().backward()
            assert whole.grad.shape == whole.shape
        assert out.requires_grad == (name != "detach")


def test_communication_is_that_of_a_ring():
    rates = Rates(within_node=100e9, between_nodes=10e9, gpus_per_node=4, latency=0)
    gather = {"all-gather": fake.Collectives(1, 8_000_000_000)}
    assert seconds(gather, 4, rates) == pytest.approx(8e9 * 3 / 4 / 100e9)
    assert seconds(gather, 8, rates) == pytest.approx(8e9 * 7 / 8 / (4 * 10e9)), "the links between nodes are slower"
    assert seconds({"all-reduce": fake.Collectives(1, 8_000_000_000)}, 4, rates) == 2 * seconds(gather, 4, rates)
    assert seconds(gather, 1, rates) == 0


def test_shards_are_those_that_deepspeed_makes(toy_world, tmp_path):
    recipe = make_recipe(toy_world, "shards", training__precision="bf16")
    dry = json.loads(medvlm("train", recipe, "--dry-run", "--ranks", 2, "--json"))["bytes_per_rank"]
    script = f"""
        import json
        from medvlm.config.load import load_recipe
        from medvlm.training import distributed, setup
        distributed.start()
        zero = setup.start(load_recipe({str(recipe)!r})).engine.optimizer
        masters = zero.fp32_partitioned_groups_flat
        print(json.dumps({{"masters": sum(t.numel() * t.itemsize for t in masters)}}), flush=True)
    """
    masters = two_ranks(script, tmp_path)[0]["masters"]
    assert dry["optimizer"] == pytest.approx(3 * masters, abs=64), "Adam has two moments, and counters of a few bytes"


def test_offload_to_a_drive_is_rehearsed_without_one(toy_world, tmp_path):
    """Neither DeepSpeed's async_io, which takes a compiler, nor the drive's folder: those are on other machines."""
    recipe = make_recipe(toy_world, "drive", training__zero="zero3_nvme")
    cache = tmp_path / "compiled"
    done = zygote().run(["train", str(recipe), "--dry-run", "--ranks", "2", "--json"], TORCH_EXTENSIONS_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    assert not cache.exists() and not Path("/local_nvme").exists()
    in_memory = json.loads(medvlm("train", recipe, "--dry-run", "--ranks", 2, "--json", "training.zero=zero3_offload"))
    assert json.loads(done.stdout)["shapes"] == in_memory["shapes"]


def test_dry_run_says_what_ranks_read_and_refuses_a_batch_they_cannot_share(toy_world):
    recipe = make_recipe(toy_world, "reads")
    dry = json.loads(medvlm("train", recipe, "--dry-run", "--ranks", 2, "--json"))
    planned = json.loads(medvlm("shards", "plan", recipe, "--world-size", 2, "--json"))
    first = dry["reads"]["positions"][0]
    assert first["keys"] == [key for pack in planned["steps"][0]["ranks"][0] for key in pack][:4]
    assert dry["reads"]["plan"] == planned["plan_hash"] and dry["checkpoints"]["first"] == "step-00000004"
    assert "is not a multiple" in medvlm("train", recipe, "--dry-run", "--ranks", 3, status=2)
    epoch = ("training.steps=null", "training.epochs=1", "training.checkpoint_every=500")
    dry = json.loads(medvlm("train", recipe, *epoch, "--dry-run", "--ranks", 2, "--json"))
    assert dry["checkpoints"]["first"] == f"step-{dry['reads']['steps']:08d}" != "step-00000500"


def test_a_dry_run_refuses_damaged_data_and_does_without_absent_ones(toy_world, tmp_path):
    shutil.copytree(toy_world / "shards", tmp_path / "shards")
    tar = next((tmp_path / "shards").glob("*.tar"))
    recipe = make_recipe(toy_world, "cut", data__train=[str(tmp_path / "shards")])
    tar.write_bytes(tar.read_bytes()[:5000])
    said = medvlm("train", recipe, "--dry-run", "--ranks", 2, status=2)
    assert str(tar) in said and "Traceback" not in said
    shutil.rmtree(tmp_path / "shards")
    assert "the data are not there" in medvlm("train", recipe, "--dry-run", "--ranks", 2)


def test_a_secondary_copy_on_each_node_is_rehearsed_too(toy_world):
    config = json.loads(deepspeed_config_path("zero3_hpz").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (toy_world / "hpz.json").write_text(json.dumps(config))
    recipe = make_recipe(toy_world, "hpz", training__zero=str(toy_world / "hpz.json"))
    dry = json.loads(medvlm("train", recipe, "--dry-run", "--ranks", 2, "--json"))
    assert dry["bytes_per_rank"]["optimizer"] > 0


def test_a_hub_name_out_of_reach_is_one_sentence_with_its_mend():
    said = medvlm("plan", "llava_med-stage2", status=2)
    assert "Traceback" not in said and "not its weights" in said


def test_training_is_refused_before_it_starts_where_it_cannot_fit(toy_world, tmp_path):
    recipe = make_recipe(toy_world, "large", training__micro_batch_size=1)
    said = refused_for_memory(recipe, tmp_path)
    assert "parameters and optimizer alone" in said and "take more ranks" in said
    assert not list((toy_world / "runs" / "large").glob("checkpoints/*"))


def test_sharded_weights_load_under_zero3_without_a_rank_holding_the_model(tmp_path):
    script = f"""
        import json, sys, hashlib
        sys.path.insert(0, {str(REPO / "benchmarks")!r})
        import torch, deepspeed, zero3_init as z
        from pathlib import Path
        from medvlm.training import distributed
        distributed.start()
        folder = Path({str(tmp_path)!r}) / "llm"
        shape = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8,
                     num_key_value_heads=8, vocab_size=4096)
        if distributed.rank() == 0:
            z.save_pretrained(folder, shape)
        distributed.barrier()
        assert len(list(folder.glob("*.safetensors"))) > 2
        tower = dict(config=z.CLIP, feature_layer=-1, select_strategy="full")
        model, allocated, _ = z.build(dict(vision_tower=tower, language_model=dict(path=str(folder))))
        whole = sum(p.ds_numel for p in model.parameters()) * 2
        same = True
        from safetensors.torch import load_file
        stored = {{k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}}
        for name, p in model.language_model.named_parameters():
            with deepspeed.zero.GatheredParameters([p]):
                same &= torch.equal(p, stored[name])
        print(json.dumps(dict(allocated=allocated, whole=whole, same=same)), flush=True)
    """
    for rank in two_ranks(script, tmp_path):
        assert rank["same"]
        assert rank["allocated"] < 0.85 * rank["whole"], "half of it, and what is gathered at a time"
