"""Samples in memory, and models that know pictures by their grey value and texts by a table."""

import io

import numpy as np
import torch
from PIL import Image

from medvlm.data.schema import Sample

SIDE = 32


class Reader:
    """Samples in memory whose picture is one grey value, by which a model of the test knows it."""

    def __init__(self, samples):
        self.samples = [Sample.model_validate({**BASE, "key": f"s{i}", **fields}) for i, fields in enumerate(samples)]

    def __len__(self):
        return len(self.samples)

    def sample(self, i):
        return self.samples[i]

    def images(self, i):
        out = []
        for n in range(len(self.samples[i].images)):
            buffer = io.BytesIO()
            Image.new("L", (SIDE, SIDE), i if n == 0 else 200 + i).save(buffer, "png")
            out.append(buffer.getvalue())
        return out


BASE = {
    "source": "toy",
    "license": "CC0-1.0",
    "split": "test",
    "images": [{"file": "0.png", "width": SIDE, "height": SIDE}],
}


class Model:
    """Embeds a picture by its grey value and a text by a table; ``grids`` are the patches of pictures."""

    def __init__(self, images, texts, grids=None):
        self.of_image, self.of_text, self.grids = images, texts, grids

    def rows(self, values, normalized):
        rows = torch.tensor(np.array(values), dtype=torch.float32)
        return torch.nn.functional.normalize(rows, dim=-1) if normalized else rows

    def images(self, images, batch_size=32, *, normalized=True):
        return self.rows([self.of_image[image.getpixel((0, 0))] for image in images], normalized)

    def texts(self, texts, batch_size=32, *, normalized=True):
        return self.rows([self.of_text[text] for text in texts], normalized)

    def patches(self, images, batch_size=32):
        return self.rows([self.grids[image.getpixel((0, 0))] for image in images], True)

    def pixels(self, images):
        return {"pixel_values": torch.stack([torch.tensor(np.asarray(i) / 255).permute(2, 0, 1) for i in images])}


def unit(*values):
    return list(map(float, values))


def reports(texts, **fields):
    return Reader([{"report": {"findings": t}, "patient_id": f"p{i}", **fields} for i, t in enumerate(texts)])


def labelled(rows, **more):
    return Reader([{"labels": r, "patient_id": f"p{i}", **more} for i, r in enumerate(rows)])
