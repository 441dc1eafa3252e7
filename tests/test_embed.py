"""The embedder gives what transformers' own classes give, of any dual encoder, and says what it cut off."""

import json
import shutil

import numpy as np
import pytest
import torch
from dual import KINDS, TOWERS, make_dual
from dual_toy import attending_to_one
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from medvlm.errors import UserError
from medvlm.inference.embed import Embedder

TEXTS = ["no effusion", "the heart is enlarged", "left lung normal on the right"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dual")
    return {kind: make_dual(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (50, 40 + i), dtype=np.uint8)) for i in range(5)]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers_whatever_the_batch(folders, pictures, kind):
    embedder = Embedder(folders[kind])
    image, text = embedder.images(pictures, batch_size=2), embedder.texts(TEXTS, batch_size=2)
    model = AutoModel.from_pretrained(folders[kind]).eval()
    tokenizer, processor = (c.from_pretrained(folders[kind]) for c in (AutoTokenizer, AutoImageProcessor))
    with torch.inference_mode():
        for i, picture in enumerate(pictures):
            pixels = processor(images=[picture.convert("RGB")], return_tensors="pt")
            words = tokenizer(
                [TEXTS[i % 3]],
                return_tensors="pt",
                **({"padding": "max_length", "max_length": 64} if kind == "siglip" else {}),
            )
            words.pop("token_type_ids", None)
            out = model(**words, **pixels)  # the embeddings of the whole forward pass, normalised by the model
            torch.testing.assert_close(image[i], out.image_embeds[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(text[i % 3], out.text_embeds[0], atol=1e-5, rtol=1e-4)
    assert embedder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert image.norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)
    raw = embedder.images(pictures, normalized=False)
    assert not np.allclose(raw.norm(dim=1), 1) and torch.allclose(torch.nn.functional.normalize(raw), image, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", *(f"{tower}-bert" for tower in TOWERS)])
def test_a_patch_has_the_embedding_of_the_image_had_it_been_all_there_is_to_pool(tmp_path, pictures, kind):
    """By a class token that attends to it alone, by SigLIP's head, or, of Swin, by the mean."""
    embedder = Embedder(make_dual(tmp_path / kind, kind))
    image, patches = (f(pictures, normalized=False) for f in (embedder.images, embedder.patches))
    wide = 32 if kind == "siglip" else 16
    assert patches.shape == (5, 4, 4, wide) and patches.flatten(1, 2).std(1).min() > 1e-4
    if kind == "swin-bert":
        torch.testing.assert_close(patches.mean((1, 2)), image, atol=1e-5, rtol=1e-4)
        return
    tower = embedder.model.vision_model
    if kind.startswith("siglip"):
        with torch.inference_mode():  # one token, or many that are alike
            pool, tokens = tower.head, torch.randn(3, 1, 32)
            torch.testing.assert_close(pool(tokens), pool(tokens.expand(3, 16, 32)), atol=1e-5, rtol=1e-4)
            hidden = tower(pixel_values=embedder.pixels(pictures)["pixel_values"]).last_hidden_state
            head = getattr(embedder.model, "visual_projection", torch.nn.Identity())
            torch.testing.assert_close(patches[:, 1, 2], head(pool(hidden[:, 6:7])), atol=1e-5, rtol=1e-4)
        return
    for place, patch in enumerate(patches.flatten(1, 2).unbind(1)):
        with attending_to_one(tower, 1 + place):
            torch.testing.assert_close(patch, embedder.images(pictures, normalized=False), atol=1e-5, rtol=1e-4)


def test_a_tower_without_a_known_grid_is_refused(folders, pictures):
    embedder = Embedder(folders["vit-bert"])
    embedder.model.vision_model.config.patch_size = 4  # more patches than there are tokens
    with pytest.raises(UserError, match="the vit tower has no grid of patches"):
        embedder.patches(pictures)


def test_patches_lie_in_the_order_of_the_picture(folders):
    """A change of one corner of the picture changes that corner's patch most (untrained towers attend evenly)."""
    embedder = Embedder(folders["clip"])
    grey = Image.new("L", (32, 32), 128)
    changed = grey.copy()
    changed.paste(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)), (24, 8))
    before, after = embedder.patches([grey, changed], normalized=False)
    assert (after - before).norm(dim=-1).flatten().argmax() == 1 * 4 + 3


def test_occlusions_are_what_an_embedding_loses_by_a_hidden_square(folders):
    """Through transformers alone, with squares that are hidden by hand."""
    embedder = Embedder(folders["clip"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    found = embedder.occlusions([picture, picture.rotate(90)], batch_size=5, grid=4)
    assert found.shape == (2, 4, 4, 16)
    pixels = embedder.pixels([picture])["pixel_values"]
    model = AutoModel.from_pretrained(folders["clip"]).eval()
    # cells of 8 pixels: of the corner, of an edge and of the middle the square reaches half a cell beyond
    for (row, column), (rows, columns) in {
        (0, 0): ((0, 12), (0, 12)),
        (3, 1): ((20, 32), (4, 20)),
        (1, 2): ((4, 20), (12, 28)),
    }.items():
        hidden = pixels.clone()
        hidden[0, :, slice(*rows), slice(*columns)] = pixels[0].mean((1, 2))[:, None, None]
        with torch.inference_mode():
            whole, less = (
                torch.nn.functional.normalize(model.get_image_features(p).pooler_output, dim=-1)
                for p in (pixels, hidden)
            )
        torch.testing.assert_close(found[0, row, column], (whole - less)[0], rtol=1e-4, atol=1e-6)


def test_long_texts_are_cut_and_counted(folders):
    embedder = Embedder(folders["clip"])
    long = "no effusion " * 100
    embedder.texts([*TEXTS, long])
    assert list(embedder.truncated) == [long] and embedder.truncated[long] > embedder.max_length == 64
    with pytest.raises(UserError, match="text 1 is empty"):
        embedder.texts(["clear", " "])


def damaged(folder, tmp_path, file, change):
    shutil.copytree(folder, tmp_path / "damaged")
    values = json.loads((tmp_path / "damaged" / file).read_text())
    change(values)
    (tmp_path / "damaged" / file).write_text(json.dumps(values))
    return tmp_path / "damaged"


def test_code_that_comes_with_a_folder_runs_only_when_asked(folders, tmp_path, pictures):
    own = damaged(
        folders["clip"],
        tmp_path,
        "config.json",
        lambda c: c.update(
            model_type="own_clip", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
        ),
    )
    (own / "own.py").write_text(
        "from transformers import CLIPConfig, CLIPModel\n"
        "class OwnConfig(CLIPConfig):\n    model_type = 'own_clip'\n"
        "class OwnModel(CLIPModel):\n    config_class = OwnConfig\n"
        "    def get_image_patch_features(self, pixel_values):\n"
        "        n = len(pixel_values)\n"
        "        return self.get_image_features(pixel_values).pooler_output[:, None, None].expand(n, 2, 3, -1)\n"
    )
    with pytest.raises(UserError, match="add --trust-remote-code"):
        Embedder(own)
    embedder = Embedder(own, trust_remote_code=True)
    assert torch.equal(embedder.texts(TEXTS), Embedder(folders["clip"]).texts(TEXTS))
    patches = embedder.patches(pictures)
    assert patches.shape == (5, 2, 3, 16)
    delattr(type(embedder.model), "get_image_patch_features")
    with pytest.raises(UserError, match="how the patches of OwnModel come into the joint space is not known"):
        embedder.patches(pictures)
    torch.testing.assert_close(patches[:, 1, 2], embedder.images(pictures))


def test_what_is_no_dual_encoder_is_said(folders, tmp_path):
    from transformers import BertConfig, BertModel

    folder = tmp_path / "bert"
    shutil.copytree(folders["vit-bert"], folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    ).save_pretrained(folder)
    with pytest.raises(UserError, match="no dual encoder"):
        Embedder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        Embedder(tmp_path / "empty")


def test_a_missing_weight_and_nan_are_said(folders, tmp_path, pictures):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "without"
    shutil.copytree(folders["clip"], folder)
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight\(s\) are missing.*visual_projection"):
        Embedder(folder)
    save_file(
        {**weights, "visual_projection.weight": head * torch.nan},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="NaN"):
        Embedder(folder).images(pictures)
