"""Heat maps: where a processor puts a picture, CNR and mIoU by hand, and bootstrap intervals of any statistic."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import CLIPImageProcessor

from medvlm.errors import UserError
from medvlm.evaluation import heat_map
from medvlm.evaluation.intervals import resampled


def processor(size=(96, 96), crop=None, pad=False, mean=0.5, std=0.25):
    """Pictures -> [N, 3, H, W]: resized to (width, height), perhaps after padding to a square, and cropped."""

    def process(pictures):
        out = []
        for picture in pictures:
            if pad:
                side = max(picture.size)
                square = Image.new("RGB", (side, side))
                square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
                picture = square
            pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) / 255
            if crop:
                top, left = (pixels.shape[0] - crop) // 2, (pixels.shape[1] - crop) // 2
                pixels = pixels[top : top + crop, left : left + crop]
            out.append(torch.from_numpy((pixels - mean) / std).permute(2, 0, 1))
        return torch.stack(out)

    return process


@pytest.mark.parametrize(
    ("process", "size", "expected"),
    [
        (processor((96, 96)), (300, 200), (96 / 300, 0, 96 / 200, 0, 96, 96)),
        (processor((64, 64)), (40, 50), (1.6, 0, 1.28, 0, 64, 64)),
        (processor((150, 100), crop=96), (300, 200), (0.5, -27, 0.5, -2, 96, 96)),
        (processor((96, 96), pad=True), (300, 200), (0.32, 0, 0.32, 16, 96, 96)),
    ],
    ids=["squeezed", "enlarged", "cropped", "padded"],
)
def test_a_frame_is_found_whatever_a_processor_does(process, size, expected):
    found = heat_map.find_frame(process, *size)
    assert found == pytest.approx(expected, abs=0.05)
    assert found.ax == pytest.approx(expected[0], rel=5e-3) and found.ay == pytest.approx(expected[2], rel=5e-3)


def test_the_frame_of_clips_own_processor_is_its_crop():
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48})
    found = heat_map.find_frame(lambda p: processor(images=p, return_tensors="pt")["pixel_values"], 160, 128)
    assert found == pytest.approx((0.5, -16, 0.5, -8, 48, 48), abs=0.05)  # 80 x 64, of which 48 x 48 are in the middle


def test_a_processor_that_turns_or_flattens_is_refused():
    plain = processor()
    with pytest.raises(UserError, match="more than resize"):
        heat_map.find_frame(lambda p: plain(p).transpose(2, 3), 60, 60)
    with pytest.raises(UserError, match="dark and bright the same"):
        heat_map.find_frame(lambda p: 0 * plain(p), 60, 60)


def test_a_map_is_placed_over_its_patches_and_ends_with_the_crop():
    cosines = np.array([[0.0, 1.0], [0.0, 1.0]])
    frame = heat_map.Frame(0.5, -10, 1.0, 0, 40, 40)  # of 120 x 40, the columns 20 .. 100 are seen
    placed = heat_map.place(cosines, frame, 120, 40)
    assert placed.shape == (40, 120)
    assert np.isnan(placed[:, :20]).all() and np.isnan(placed[:, 100:]).all()
    seen = placed[:, 20:100]
    # patch centres are columns 40 and 80 of the picture; between them it is linear, beyond them constant
    expected = np.clip((np.arange(20, 100) + 0.5 - 40) / 40, 0, 1)
    np.testing.assert_allclose(seen, np.broadcast_to(expected, seen.shape), atol=1e-12)


def test_similarities_are_cosines_smoothed():
    patches = torch.zeros(9, 9, 2)
    patches[..., 1] = 1
    patches[4, 4] = torch.tensor([1.0, 0.0])
    text = torch.tensor([1.0, 0.0])
    sharp = heat_map.similarity_map(patches, text, sigma=0)
    assert sharp[4, 4] == 1 and sharp.sum() == 1
    smooth = heat_map.similarity_map(patches, text)
    weight = stats.norm.pdf(np.arange(-6, 7), scale=1.5)  # scipy cuts the kernel at four sigma
    kernel = weight / weight.sum()
    assert smooth[4, 4] == pytest.approx(kernel[6] ** 2 + 0, abs=2e-3)
    assert smooth[4, 6] / smooth[4, 4] == pytest.approx(np.exp(-(2**2) / (2 * 1.5**2)), abs=2e-2)


def test_contrast_to_noise_and_iou_by_hand():
    mask = heat_map.box_mask([(0, 0, 2, 1), (1, 0, 2, 2)], 4, 2)
    assert mask.tolist() == [[True, True, False, False], [False, True, False, False]]
    heat = np.array([[0.6, 0.9, 0.05, 0.15], [0.15, 0.3, 0.05, 0.35]])
    inside, outside = [0.6, 0.9, 0.3], [0.05, 0.15, 0.15, 0.05, 0.35]
    expected = (np.mean(inside) - np.mean(outside)) / np.sqrt(np.var(inside) + np.var(outside))
    assert heat_map.contrast_to_noise(heat, mask) == pytest.approx(expected)
    assert heat_map.contrast_to_noise(-heat, mask) == pytest.approx(-expected)
    # above .1 are 6 pixels, 3 right; above .2 are 4; above .3 are 3 of which 2; above .4 and .5 the same 2
    assert heat_map.mean_iou(heat, mask) == pytest.approx(np.mean([3 / 6, 3 / 4, 2 / 4, 2 / 3, 2 / 3]))
    assert heat_map.rescaled(heat).min() == 0 and heat_map.rescaled(heat).max() == 1
    unseen = np.where(np.arange(4)[None] == 3, np.nan, heat)
    outside = [0.05, 0.15, 0.05]
    expected = (np.mean(inside) - np.mean(outside)) / np.sqrt(np.var(inside) + np.var(outside))
    assert heat_map.contrast_to_noise(unseen, mask) == pytest.approx(expected)
    assert heat_map.mean_iou(unseen, mask, (0.1,)) == pytest.approx(3 / 4)


def test_maps_without_contrast_score_nothing():
    mask = heat_map.box_mask([(0, 0, 2, 2)], 4, 4)
    assert heat_map.contrast_to_noise(np.full((4, 4), 0.3), mask) == 0
    assert heat_map.contrast_to_noise(np.full((4, 4), 0.3), ~np.zeros((4, 4), bool)) is None
    assert heat_map.mean_iou(np.zeros((4, 4)), mask) == 0
    assert heat_map.mean_iou(mask.astype(float), mask) == 1


def test_an_interval_of_the_mean_is_the_theorys_and_wider_for_dependent_rows():
    values = np.repeat([0.0, 1.0], 200)
    low, high = resampled(lambda rows: float(values[rows].mean()), range(400))
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)  # 0.5 -/+ 1.96 sqrt(0.25 / 400)
    low, high = resampled(lambda rows: float(values[rows].mean()), [i // 40 for i in range(400)])
    assert high - low > 0.4
    assert resampled(lambda rows: None, range(10)) is None
