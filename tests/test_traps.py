"""DeepSpeed and transformers traps that bite silently and have no place in another test file."""

import os

import pytest
import torch
from conftest import launch, two_ranks
from toy import LLAMA, SIGLIP, make_recipe, make_shards, make_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from medvlm.config.load import load_recipe
from medvlm.errors import UserError
from medvlm.models.build import build_components, build_model
from medvlm.training import checkpoint, distributed


def test_segments_of_a_padding_free_row_do_not_see_each_other(tmp_path):
    """transformers builds the block mask from position_ids only without a mask and without a cache."""
    make_tokenizer(tmp_path / "tokenizer")
    config = load_recipe(str(make_recipe(tmp_path, model__attention="sdpa")))
    model = build_model(config.model, build_components(config.model), torch.float32)  # in train mode
    first, second = torch.randint(5, 250, (1, 7)), torch.randint(5, 250, (1, 9))
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    positions, ones = torch.tensor([[*range(7), *range(9)]]), torch.ones(1, 16).long()
    packed = model.hidden_states(torch.cat([first, second], 1), none, position_ids=positions)
    assert torch.allclose(packed[:, 7:], model.hidden_states(second, none), atol=1e-5)
    decoder = model.language_model.get_decoder()
    given = {"inputs_embeds": model.language_model.get_input_embeddings()(torch.cat([first, second], 1))}
    given["position_ids"] = positions
    for leak in ({"attention_mask": ones}, {"use_cache": True}, {}):  # use_cache is true unless told
        with pytest.raises(ValueError, match="its samples would see each other"):
            decoder(**given, **leak)
    padded = torch.tensor([[0] * 7 + [1] * 9])  # positions as `generate` makes them on the left of a text
    given["position_ids"] = (padded.cumsum(-1) - 1).masked_fill(padded == 0, 1)
    decoder(**given, attention_mask=padded)
    given["position_ids"] = positions
    decoder._forward_pre_hooks.clear()
    leaking = decoder(**given, attention_mask=ones)
    assert (leaking.last_hidden_state[:, 7:] - packed[:, 7:]).abs().max() > 1e-3, "the comparison must be able to fail"


def test_scalar_parameters_are_named_before_deepspeed_crashes_on_them(tmp_path):
    """CLIP's and SigLIP's logit_scale have no dimension, which deepspeed.initialize cannot broadcast."""
    rows = two_ranks(
        """
        import json, torch
        from medvlm.training import distributed
        from medvlm.training.engine import lift_scalars

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.tensor(2.0))
                self.linear = torch.nn.Linear(4, 4)

            def forward(self, x):
                return (self.linear(x) * self.scale).sum()

        distributed.start()
        torch.manual_seed(0)
        model = Model()
        lifted = lift_scalars(model)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2},
                  "zero_allow_untested_optimizer": True}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = distributed.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        loss = engine(torch.ones(1, 4))
        engine.backward(loss)
        engine.step()
        print(json.dumps({"lifted": lifted, "scale": float(engine.module.scale), "loss": float(loss)}), flush=True)
        """,
        tmp_path,
    )
    assert [row["lifted"] for row in rows] == [["scale"]] * 2
    assert rows[0]["scale"] == rows[1]["scale"] != 2.0


def test_resized_embeddings_keep_the_pretrained_rows(tmp_path):
    """A tokenizer with more tokens than the model: rows are added, to a multiple of 64, and none is lost."""
    make_tokenizer(tmp_path / "tokenizer")
    values = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"vocab_size": 300}
    torch.manual_seed(0)
    pretrained = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
    pretrained.save_pretrained(tmp_path / "llama")
    path = str(tmp_path / "llama")
    recipe = make_recipe(tmp_path, model__language_model__config=None, model__language_model__path=path)
    config = load_recipe(str(recipe))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    embedding = model.language_model.get_input_embeddings().weight
    assert embedding.shape[0] == 320 == parts.text_config.vocab_size
    assert torch.equal(embedding[:300], pretrained.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
def test_pretrained_backbones_are_loaded_whole(tmp_path, family):
    """From folders as the hub has them: the vision half of a CLIP or SigLIP checkpoint, a bare DINOv2 or ViT."""
    vision, language = pretrained_folders(tmp_path, family)
    config = load_recipe(str(pretrained_recipe(tmp_path)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    assert_loaded(model.state_dict(), vision, language)


def test_pretrained_backbones_are_loaded_whole_when_born_sharded(tmp_path):
    """Two ranks under ZeRO-3, one step at a vanishing learning rate: the checkpoint holds the folders' weights."""
    vision, language = pretrained_folders(tmp_path, "clip")
    make_shards(tmp_path / "shards")
    still = {f"model__{part}__learning_rate": 1e-12 for part in ("vision_tower", "language_model")}
    launch(pretrained_recipe(tmp_path, training__steps=1, training__weight_decay=0.0, **still))
    weights = checkpoint.consolidate(checkpoint.newest(tmp_path / "runs" / "run"))
    # these do not influence the features: they stay as the folder has them, and are not stored
    assert weights.absent == {f"vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}
    used = {name: value for name, value in vision.items() if "post_layernorm" not in name}
    assert_loaded(weights, used, language)


def pretrained_folders(folder, family):
    values = {k: v for k, v in SIGLIP.items() if k != "model_type"}
    torch.manual_seed(0)
    if family in ("clip", "siglip"):
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(family, vision_config=values, text_config={**text, "vocab_size": 99})
    else:
        config = AutoConfig.for_model(family, **values)
    whole = AutoModel.from_config(config)
    whole.save_pretrained(folder / "vision")
    values = {k: v for k, v in LLAMA.items() if k != "model_type"}
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
    language.save_pretrained(folder / "llama")
    return getattr(whole, "vision_model", whole).state_dict(), language.state_dict()


def pretrained_recipe(folder, **overrides):
    make_tokenizer(folder / "tokenizer")
    return make_recipe(
        folder,
        model__vision_tower__config=None,
        model__vision_tower__path=str(folder / "vision"),
        model__language_model__config=None,
        model__language_model__path=str(folder / "llama"),
        **overrides,
    )


def assert_loaded(state, vision, language) -> None:
    for name, expected in language.items():
        assert torch.allclose(state[f"language_model.{name}"], expected, atol=1e-9), name
    tower = {n.removeprefix("vision_tower.").removeprefix("vision_model."): v for n, v in state.items()}
    expected = {n.removeprefix("vision_model."): v for n, v in vision.items() if "position_ids" not in n}
    assert len(expected) > 10
    for name, value in expected.items():
        assert torch.allclose(tower[name], value, atol=1e-9), name


def test_ranks_of_which_one_has_no_gpu_are_refused(tmp_path):
    """As where a node's driver failed: each kind would wait for ranks that never come."""
    rows = two_ranks(
        """
        import json, os, torch
        from medvlm.errors import UserError
        from medvlm.training import distributed
        here, rank = torch.cuda.is_available, os.environ["RANK"]
        torch.cuda.is_available = lambda: rank == "1"
        try:
            distributed._meet()
        except UserError as error:
            print(json.dumps({"said": str(error)}), flush=True)
        torch.cuda.is_available = here
        os._exit(0)
        """,
        tmp_path,
    )
    assert len(rows) == 2 and all("not alike: no GPU, rank 0 on" in row["said"] for row in rows)
    assert all(", rank 0 on" in row["said"] and "and a GPU, rank 1 on" in row["said"] for row in rows)


@pytest.mark.parametrize(
    ("count", "local", "given", "chosen"),
    [
        (1, 3, "1", "0"),
        (1, 3, None, r"sees 1 GPU\(s\)"),
        (8, 3, "8", "3"),
        (0, 1, "0", "1"),
        (2, 3, "2", r"sees 2 GPU\(s\)"),
        (0, 1, "8", "sees none"),
    ],
)
def test_each_rank_takes_a_gpu_that_it_is_shown(monkeypatch, count, local, given, chosen):
    """One for each task with --gpus-per-task, all of a node's with --gpus-per-node; without Slurm none is shared."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(distributed, "CPU_CHOSEN", False)
    slurm = {"SLURM_GPUS_ON_NODE": given, "SLURM_LOCALID": str(local)} if given else {}
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "11", "LOCAL_RANK": str(local), **slurm}.items():
        monkeypatch.setenv(name, value)
    if chosen.isdigit():
        distributed._choose_device()
        assert os.environ["LOCAL_RANK"] == chosen
    else:
        with pytest.raises(UserError, match=chosen):
            distributed._choose_device()
