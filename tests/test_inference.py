"""Images as a reader would see them, and answers from a stock folder that our training code never touched."""

import csv

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from toy import make_tokenizer
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from medvlm.errors import UserError
from medvlm.inference.generate import Generator
from medvlm.inference.images import decode_image, load_image

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{% for part in m['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def make_stock_folder(folder, seed=0):
    """A random LLaVA of transformers' own classes (CLIP, Llama): 4 image tokens, weights large enough to matter."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder.with_name(folder.name + "-tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=32, patch_size=16, projection_dim=32),
        text_config=LlamaConfig(**size, vocab_size=len(tokenizer), initializer_range=0.3),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_stock_folder(tmp_path_factory.mktemp("stock") / "llava")


@pytest.fixture(scope="module")
def generator(folder):
    return Generator(folder)


def ask(text, *images):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return list(images), [{"role": "user", "content": content}]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 50), dtype=np.uint8))


def write_dicom(path, pixels, photometric="MONOCHROME2", **elements):
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(pixels.dtype == np.int16)
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_a_16_bit_png_is_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 4095, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    shown = np.asarray(load_image(tmp_path / "deep.png"))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown.ravel(), np.rint(ramp.ravel() / 4095 * 255))


def test_8_bit_files_keep_their_pixels(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "grey.png")), grey)
    Image.new("RGB", (8, 8), (250, 5, 5)).save(tmp_path / "colour.jpg")
    assert load_image(tmp_path / "colour.jpg").mode == "RGB"


def test_dicom_window_follows_the_standard(tmp_path):
    # PS3.3 C.11.2.1.2.1: c=100, w=200 maps x<=0 to black, x>199 to white, else (x-99.5)/199+0.5; stored = x + 1000
    x = np.array([[-500, 0, 99, 150, 199, 900]], dtype=np.int16)
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": [100, 40], "WindowWidth": [200, 80]}
    expected = [0, 0, round(255 * 99 / 199), round(255 * 150 / 199), 255, 255]
    path = write_dicom(tmp_path / "a.dcm", x + 1000, **elements)
    assert np.asarray(load_image(path)).ravel().tolist() == expected
    inverted = write_dicom(tmp_path / "b.dcm", x + 1000, "MONOCHROME1", **elements)
    assert np.asarray(load_image(inverted)).ravel().tolist() == [255 - v for v in expected]


def test_dicom_without_a_window_ignores_padding(tmp_path):
    x = np.array([[-2000, 0, 50, 100]], dtype=np.int16)
    path = write_dicom(tmp_path / "a.dcm", x, PixelPaddingValue=-2000)
    assert np.asarray(load_image(path)).ravel().tolist() == [0, 0, 128, 255]


def test_every_real_dicom_gives_an_image_or_one_sentence_that_names_the_file(test_data):
    with (test_data / "dicom" / "INDEX.csv").open() as file:
        index = list(csv.DictReader(file))
    uncompressed = ("Explicit VR", "Implicit VR", "Deflated", "RLE")
    for entry in index:
        path = test_data / "dicom" / entry["file"]
        must = entry["decodes_with_pydicom3+pylibjpeg"] == "ok" and entry["transfer_syntax"].startswith(uncompressed)
        try:
            image = load_image(path)
        except UserError as error:
            assert not must, error
            assert entry["file"] in str(error) and "\n" not in str(error)
            continue
        assert entry["decodes_with_pydicom3+pylibjpeg"] == "ok", entry
        colour = entry["array_shape"].endswith(", 3)") or entry["photometric"] == "PALETTE COLOR"
        assert image.mode == ("RGB" if colour else "L")
        low, high = (np.asarray(image).min(), np.asarray(image).max())
        assert high - low > 100, f"{entry['file']} is flat: {low} to {high}"


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (tmp_path / "b.dcm").write_bytes(b"nothing")
    for path in (tmp_path / "a.png", tmp_path / "b.dcm", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=path.name):
            load_image(path)
    with pytest.raises(UserError, match="study7"):
        decode_image(b"", "study7")


def test_answers_keep_their_order_whatever_the_batches(generator):
    one, two = picture(1), picture(2)
    requests = [
        ask("is there an effusion on the left", one),
        ask("normal"),
        ask("is the heart enlarged", one, two),
        ask("right", two),
        ask("text only no image at all"),
        ask("left", one),
    ]
    alone = [generator.answers([request], max_new_tokens=6, batch_size=1)[0] for request in requests]
    assert generator.answers(requests, max_new_tokens=6, batch_size=4) == alone
    assert len(set(alone)) > 1


def test_answers_are_transformers_own_greedy_tokens(generator, folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    image = picture(3)
    text = processor.apply_chat_template(ask("heart", image)[1], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
    ids = inputs["input_ids"]
    for _ in range(5):  # by hand: no generate(), no cache
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    new = ids[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert generator.answers([ask("heart", image)], max_new_tokens=5)[0] == expected


def test_the_picture_reaches_the_answer(generator):
    answers = generator.answers([ask("heart", picture(seed)) for seed in range(12)], max_new_tokens=8)
    assert len(set(answers)) > 1


def test_a_wrong_number_of_images_is_refused(generator):
    with pytest.raises(UserError, match=r"2 image\(s\) but 1"):
        generator.answers([([picture(0)], ask("heart", 1, 2)[1])])


def test_folders_that_do_not_load_say_why(tmp_path, folder):
    with pytest.raises(UserError, match="no such model folder"):
        Generator(tmp_path / "absent")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="medvlm export"):
        Generator(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="no weights"):
        Generator(tmp_path)


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path, folder):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if "multi_modal_projector" in n)
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing or misshapen"):
        Generator(broken)


def test_png_jpeg_and_dicom_work_from_the_command_line(tmp_path, folder, capsys, monkeypatch):
    from medvlm import cli

    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.jpg")
    write_dicom(tmp_path / "c.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8))
    for name in ("a.png", "b.jpg", "c.dcm"):
        arguments = ["medvlm", "generate", str(folder), "--image", str(tmp_path / name), "--prompt", "heart"]
        monkeypatch.setattr("sys.argv", [*arguments, "--max-new-tokens", "3"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    assert capsys.readouterr().out.count("\n") >= 3
