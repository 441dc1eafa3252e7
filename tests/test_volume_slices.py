"""Volumes as slices: which, with which values, how they are counted, and that nothing else changes."""

import nibabel
import numpy as np
import pytest
import torch
from conftest import medvlm
from PIL import Image as PILImage
from toy import make_recipe, make_tokenizer, sample, volume_sample

from medvlm.config.load import load_recipe
from medvlm.data import volumes
from medvlm.data.schema import Image
from medvlm.data.shards import write_shards
from medvlm.data.volume_slices import VolumeSlices
from medvlm.data.volumes import decode_volume, encode_volume
from medvlm.errors import UserError
from medvlm.inference.images import load_images
from medvlm.models.build import build_components
from medvlm.training import feed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A volume of 9 slices, one of 2, a picture beside a volume, three windows, and samples without volumes."""
    folder = tmp_path_factory.mktemp("volumes")
    make_tokenizer(folder / "tokenizer")
    items = [
        volume_sample(0, 9),
        volume_sample(1, 2),
        volume_sample(2, 6, picture=True),
        volume_sample(3, 5, windows=3),
        sample(4, 1, ["yes"]),
        sample(5, 0, ["no"]),
    ]
    write_shards(iter(items), folder / "shards", "toy", 10)
    return folder


def dataset(world, **options):
    config = load_recipe(str(make_recipe(world, data__cache_dir=str(world / "cache"), **options)))
    return config, feed.training_data(config, build_components(config.model))


def test_slices_are_the_middles_of_equal_parts():
    assert VolumeSlices(3).places(9) == [1, 4, 7]
    assert VolumeSlices(4).places(8) == [1, 3, 5, 7]
    assert VolumeSlices(2).places(5) == [1, 3]
    assert VolumeSlices(8).places(3) == [0, 1, 2], "every slice of a thinner volume, none twice"


@pytest.mark.parametrize("name", ["totalseg_example_ct_sm.nii.gz", "nibabel_anatomical.nii"])
def test_slices_of_a_real_volume_are_the_windowed_slices_of_the_file(test_data, name):
    """Beside nibabel's own reader: axial slices from the feet up, the patient's left at the viewer's right."""
    path = test_data / "nifti" / name
    image = nibabel.as_closest_canonical(nibabel.load(path))  # RAS: x to the right, y to the front, z to the head
    whole = np.asarray(image.dataobj).astype(np.float64).squeeze()
    center, width = float(np.median(whole)), float(np.ptp(whole)) / 2 or 1.0
    places = [(2 * n + 1) * whole.shape[2] // 8 for n in range(4)]
    pictures = load_images(path, 4, (center, width))
    for z, picture in zip(places, pictures, strict=True):
        plane = whole[::-1, ::-1, z].T
        expected = np.rint(255 * np.clip((plane - (center - width / 2)) / width, 0, 1))
        assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1  # float32 against float64


def test_only_the_chosen_slices_are_decompressed(monkeypatch):
    array = np.arange(64 * 20 * 20, dtype=np.int16).reshape(64, 20, 20) % 400
    asked = []
    read = volumes.read_subvolume
    monkeypatch.setattr("medvlm.data.volume_slices.read_subvolume", lambda d, s: asked.append(s) or read(d, s))
    planes = VolumeSlices(4, (200, 400)).decode(encode_volume(array), "x")
    assert asked == [(slice(z, z + 1),) for z in (8, 24, 40, 56)]
    expected = volumes.window(array, [(200, 400)])[0, [8, 24, 40, 56], ..., None]
    np.testing.assert_array_equal(planes, expected)


def test_a_volume_becomes_as_many_images_as_slices_in_place(world):
    _, data = dataset(world, data__volume_slices=4, data__volume_window=[128, 256])
    tokens = data.encoder.conversation.image_tokens
    seen = [data[[(n, 0)]] for n in range(6)]
    assert [batch.quarantined for batch in seen] == [[]] * 6
    assert [batch.pixel_values.shape[0] for batch in seen] == [4, 2, 5, 4, 1, 0]
    image = data.encoder.conversation.image_id
    assert [int((batch.input_ids == image).sum()) for batch in seen] == [n * tokens for n in (4, 2, 5, 4, 1, 0)]
    assert [batch.pixel_values.shape[1] for batch in seen] == [1, 1, 1, 3, 1, 1], "three stored windows are colours"
    stored = decode_volume(data.reader.load(0)[1][0])
    middle = volumes.window(stored, [(128, 256)])[0, [1, 3, 5, 7]]
    expected = torch.stack([data.encoder.transform.resize(plane[..., None]) for plane in middle])
    assert torch.equal(seen[0].pixel_values, expected)
    assert torch.equal(seen[2].pixel_values[0], data.encoder.transform(data.reader.load(2)[1][0], "x"))


def test_lengths_are_those_of_the_encoded_samples(world):
    """Line breaks between slices included; packing and grouping go by them."""
    for slices in (3, 4):  # kept apart in the cache
        config, data = dataset(world, data__volume_slices=slices, data__volume_window=[128, 256])
        lengths = feed.count_lengths(config, data, progress=False)
        encoded = [data.encoder(*data.reader.load(n), 0) for n in range(6)]
        assert lengths.images.tolist() == [len(e.images) for e in encoded]
        assert lengths.tokens.tolist() == [len(e.ids) for e in encoded]


def test_the_plan_hash_holds_the_number_of_slices_and_is_otherwise_unchanged(world):
    hashes = []
    for options in ({}, {"data__volume_slices": 3}, {"data__volume_slices": 4}):
        config, data = dataset(world, **options)
        hashes.append(feed.make_plan(config, data, None).hash)
    assert len(set(hashes)) == 3


def test_all_slices_of_a_volume_move_alike(world):
    """Identical slices stay identical under augmentation; another sample moves otherwise."""
    _, data = dataset(world, data__volume_slices=3, data__augment={"rotate": 20, "translate": 0.1, "noise": 5})
    plane = np.random.default_rng(0).integers(0, 256, (1, 1, 40, 40)).astype(np.uint8)
    same = encode_volume(np.repeat(plane, 3, axis=1))
    made, _ = volume_sample(3, 3, windows=1)
    first, again = data.encoder(made, [same], 0).images, data.encoder(made, [same], 0).images
    assert all(torch.equal(first[0], p) for p in [*first, *again])
    assert not torch.equal(first[0], data.encoder(made, [same], 1).images[0]), "another epoch, another change"
    assert not torch.equal(first[0], data.encoder(made.model_copy(update={"key": "other"}), [same], 0).images[0])


def test_what_cannot_be_sliced_is_quarantined_with_the_mend(world):
    _, data = dataset(world)
    assert "data.volume_slices" in data[[(0, 0)]].quarantined[0][1]
    _, data = dataset(world, data__volume_slices=2)
    assert "data.volume_window" in data[[(0, 0)]].quarantined[0][1]
    two = encode_volume(np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="2 windows"):
        VolumeSlices(2).decode(two, "x")
    with pytest.raises(UserError, match="not a blosc2 frame"):
        VolumeSlices(2).decode(b"nonsense", "x")


def test_pictures_are_counted_as_before():
    stored = [Image(file="0.png", width=4, height=4), Image(file="1.b2", width=4, height=4, depth=5)]
    assert VolumeSlices(8).images(stored) == [1, 5]


def test_generate_names_a_volume_it_cannot_window(tmp_path, world):
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    with pytest.raises(UserError, match="--window"):
        load_images(path, 2, None)
    assert [p.size for p in load_images(path, 2, (0, 1))] == [(4, 4)] * 2
    PILImage.new("L", (5, 6)).save(tmp_path / "flat.png")
    assert [p.size for p in load_images(tmp_path / "flat.png", 2, None)] == [(5, 6)]
    assert "--window 40 400" in medvlm("generate", "some/model", "--image", path, "--prompt", "x", status=2)
