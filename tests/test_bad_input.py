"""Bad input gives one clear sentence and a non-zero exit, or a counted quarantine entry; nothing is lost."""

import json
import shutil

import pytest
from conftest import launch, medvlm
from toy import LLAMA, make_recipe, make_shards, make_tokenizer, sample
from transformers import AutoConfig, AutoModelForCausalLM

from medvlm.config.load import load_recipe, recipe_names
from medvlm.data.shards import ShardReader, write_shards
from medvlm.errors import UserError
from medvlm.models.backbones import load
from medvlm.models.build import build_components
from medvlm.training.setup import deepspeed_config


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    make_shards(tmp_path / "shards")
    return tmp_path


def fails(recipe, *arguments: str) -> str:
    output = launch(recipe, *arguments, ranks=1, fails=True)
    assert "Traceback" not in output
    return output[output.index("medvlm: error:") :]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name):
    try:
        load_recipe(name)
    except UserError as error:
        assert "is not installed" in str(error)
        pytest.skip(f"{name}: {error}")
    load_recipe(name, ["run.name=other"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.global_batchsize=4", "did you mean 'global_batch_size'?"),
        ("model.vision_tower.trian=full", "did you mean 'train'?"),
        ("training.steps=many", "training.steps"),
        ("training.epochs=2", "exactly one of `epochs` and `steps`"),
        ("training.zero=zero9", "known: zero0, zero1"),
        ("training.micro_batch_size=3", "not a multiple of micro_batch_size 3"),
        ("nonsense", "section.key=value"),
    ],
)
def test_wrong_configuration_names_the_field_and_the_mend(folder, override, words):
    assert words in medvlm("train", make_recipe(folder), override, status=2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "t5"}, "'t5' is no causal language model"),
        ({"model_type": "bert"}, "'bert' is no causal language model"),
        ({"model_type": "llava"}, "'llava' is a model of several towers"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, "weights are quantised (fp8)"),
    ],
)
def test_a_folder_that_is_no_language_model_of_its_own_is_refused(tmp_path, values, sentence):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm/config.json").write_text(json.dumps(values))
    path = make_recipe(tmp_path, model__language_model__config=None, model__language_model__path=str(tmp_path / "lm"))
    with pytest.raises(UserError) as refused:
        build_components(load_recipe(str(path)).llava)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("cut", "incomplete|header"), ("size", "ignore_mismatched_sizes")],
)
def test_weights_that_do_not_load_are_one_sentence(tmp_path, damage, reason):
    """A download that broke off, and a configuration of another size than its weights."""
    folder = tmp_path / "lm"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(folder)
    if damage == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    else:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**values, "intermediate_size": 2 * values["intermediate_size"]})
        )
    with pytest.raises(UserError, match=f"^here: cannot load .*({reason})"):
        load(AutoModelForCausalLM, str(folder), "here")


def test_texts_longer_than_the_language_models_positions_are_refused(folder):
    config = {**LLAMA, "max_position_embeddings": 64}
    output = fails(make_recipe(folder, model__language_model__config=config, data__max_length=128))
    assert "data.max_length: 128 is more than the 64 tokens that the language model has positions for" in output


def test_a_warm_up_that_never_ends_is_said(folder):
    said = launch(make_recipe(folder, training__steps=1, training__warmup_steps=50), ranks=1)
    assert "takes 50 steps, and the run 1: its learning rate never reaches its peak" in said


def test_an_unknown_recipe_suggests_the_nearest():
    assert "did you mean 'phantom-stage1'?" in medvlm("train", "phantom-stag1", status=2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"fp16": {"enabled": True}}, "fp16: is not for this file"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: is not for this file"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: is 0.5, and the recipe makes it 1.0"),
        ({"bf16": {"enabled": True}}, "bf16: is {'enabled': True}, and the recipe makes it {'enabled': False}"),
        ({"train_batch_size": 4}, "train_batch_size: is 4, and the recipe makes it 8"),
        ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "zero_optimization.overlap_com: Extra inputs"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: Input should be"),
        ({"zero_optimization": 3}, "has no zero_optimization.stage"),
    ],
)
def test_a_zero_configuration_that_contradicts_the_recipe_is_refused(folder, values, sentence):
    path = folder / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
    recipe = make_recipe(folder, "own", training__zero=str(path))
    with pytest.raises(UserError) as refused:
        deepspeed_config(load_recipe(str(recipe)), 2)
    assert f"{path}: {sentence}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_zero_configuration_that_agrees_is_taken(folder):
    path = folder / "own.json"
    same = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
    }
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, **same}))
    made = deepspeed_config(load_recipe(str(make_recipe(folder, "own", training__zero=str(path)))), 2)
    assert (made["train_batch_size"], made["bf16"]) == (8, {"enabled": False})


def test_a_missing_shard_folder(folder):
    assert "no such file or folder" in fails(make_recipe(folder), "data.train=[nowhere]")


def test_a_truncated_tar(folder):
    tar = next((folder / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    assert "truncated" in fails(make_recipe(folder))
    assert "toy-000000.tar" in medvlm("shards", "index", tar, status=2)


def test_a_backbone_folder_without_weights(folder):
    from transformers import AutoConfig

    values = {k: v for k, v in LLAMA.items() if k != "model_type"}
    AutoConfig.for_model("llama", **values).save_pretrained(folder / "empty")
    recipe = make_recipe(folder, model__language_model__config=None, model__language_model__path=str(folder / "empty"))
    output = fails(recipe)
    assert "model.language_model" in output and "cannot load" in output


def test_a_backbone_folder_that_lacks_some_weights(folder):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in LLAMA.items() if k != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(folder / "part")
    weights = load_file(folder / "part" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "part" / "model.safetensors", {"format": "pt"})
    recipe = make_recipe(folder, model__language_model__config=None, model__language_model__path=str(folder / "part"))
    assert "lacks 1 weights of the model, among them model.layers.1.mlp.up_proj.weight" in fails(recipe)


def damaged_shards(folder, share: int) -> None:
    """24 samples, every ``share``-th with an image that is a text file."""
    shutil.rmtree(folder / "shards")
    items = [sample(i, 1, ["yes"]) for i in range(24)]
    write_shards(
        ((s, {"0.png": b"not an image"} if i % share == 0 else files) for i, (s, files) in enumerate(items)),
        folder / "shards",
        "toy",
    )


def test_undecodable_images_are_quarantined_and_counted(folder):
    damaged_shards(folder, 12)
    launch(make_recipe(folder, training__steps=3, data__max_quarantined=0.1), ranks=1)
    rows = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    quarantine = (folder / "runs/run/quarantine-rank0.jsonl").read_text().splitlines()
    assert sum(row["quarantined"] for row in rows) == 2 == len(quarantine)
    assert "cannot be decoded" in quarantine[0]
    assert [row["images"] for row in rows] == [8 - row["quarantined"] for row in rows], "nothing takes their place"


def test_too_many_bad_samples_stop_the_run(folder):
    damaged_shards(folder, 2)
    output = fails(make_recipe(folder, data__max_quarantined=0.0))
    assert "samples were quarantined" in output and "quarantine-rank" in output


def test_no_supervised_tokens_is_an_error(folder):
    assert "0 supervised tokens" in fails(make_recipe(folder, data__max_length=4)).replace("\n", " ")


def test_a_checkpoint_of_another_model_or_order_is_refused(folder):
    recipe = make_recipe(folder, training__steps=2)
    launch(recipe, ranks=1)
    other = {**LLAMA, "hidden_size": 64}
    allow = "--allow-change"
    assert "another model" in fails(make_recipe(folder, training__steps=4, model__language_model__config=other), allow)
    smaller = make_recipe(folder, training__steps=4, training__global_batch_size=4)
    assert "global batch differ" in fails(smaller, allow)
    frozen = make_recipe(folder, training__steps=4, model__vision_tower__train="frozen")
    assert "parameters trained then and not now" in fails(frozen, allow)
    assert "of another model" in fails(
        make_recipe(folder, "third", model__init_from=str(folder / "runs" / "run"), model__language_model__config=other)
    )


def test_a_lost_checkpoint_is_not_a_silent_restart(folder):
    recipe = make_recipe(folder, training__steps=2)
    launch(recipe, ranks=1)
    checkpoint = folder / "runs/run/checkpoints/step-00000002"
    (checkpoint / "medvlm.json").unlink()
    assert "its medvlm.json is missing" in fails(recipe)
    shutil.rmtree(checkpoint)
    assert "no complete checkpoint" in fails(recipe, "run.resume=require")


def test_a_full_disk_while_writing_a_checkpoint_loses_nothing(folder):
    recipe = make_recipe(folder, training__steps=3)
    launch(recipe, "training.stop_after=1", ranks=1)
    output = launch(recipe, ranks=1, fails=True, file_size=100_000)
    assert "could not be written" in output and "is the disk full?" in output
    assert [p.name for p in (folder / "runs/run/checkpoints").glob("step-*")] == ["step-00000001"]
    launch(recipe, "run.resume=require", ranks=1)


def test_shards_need_their_images_and_unique_keys(tmp_path):
    one, files = sample(0, 1, ["yes"])
    with pytest.raises(UserError, match="were not given"):
        write_shards([(one, {})], tmp_path / "a", "toy")
    with pytest.raises(UserError, match="occurs twice"):
        write_shards([(one, files), (one, files)], tmp_path / "b", "toy")


def test_a_flipped_byte_is_noticed_when_read(folder):
    tar = next((folder / "shards").glob("*.tar"))
    reader = ShardReader(folder / "shards")
    row = reader.table.slice(0, 1).to_pylist()[0]
    data = bytearray(tar.read_bytes())
    data[row["offsets"][row["members"].index("0.png")] + 50] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum differs"):
        reader.member(0, "0.png")


def test_a_fresh_start_in_a_used_folder_is_refused(folder):
    recipe = make_recipe(folder, training__steps=1)
    launch(recipe, ranks=1)
    assert "choose another run.name" in fails(recipe, "run.resume=never")
