"""Conversation labels, image transforms and batches."""

import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from toy import TEMPLATE, make_recipe, make_shards, make_tokenizer, png, sample
from transformers import AutoTokenizer, CLIPImageProcessor, SiglipImageProcessor

from medvlm.config.load import load_recipe
from medvlm.data.conversation import (
    IGNORE,
    ConversationEncoder,
    asked_as_trained,
    multimodal_template,
    plain_template,
)
from medvlm.data.images import ImageTransform
from medvlm.data.loader import Encoded, MicroBatches, SampleEncoder, collate, load_batches, shuffle_turns
from medvlm.data.schema import make_message, parse_sample
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError
from medvlm.models.build import build_components

QWEN3_LIKE = (  # treats the last turn unlike the others, as Qwen3's template does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_tokens(["<image>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def supervised(tokenizer, ids, labels) -> list[str]:
    runs, last = [], False
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = label != IGNORE
    return [tokenizer.decode(run) for run in runs]


TURNS = [("user", "<image>\nis yes there?"), ("assistant", "yes yes"), ("user", "yes yes"), ("assistant", "no é 肺")]


@pytest.mark.parametrize(
    ("template", "end"), [(TEMPLATE, "</s>"), (None, "</s>"), (QWEN3_LIKE, "<|im_end|>"), (LLAMA2_LIKE, " </s>")]
)
def test_exactly_the_assistant_turns_and_their_ends_are_supervised(tokenizer, template, end):
    encoder = ConversationEncoder(tokenizer, multimodal_template(template), image_tokens=5)
    ids, labels = encoder([make_message(*turn) for turn in TURNS])
    answers = [text.strip() for text in supervised(tokenizer, ids, labels)]
    assert answers == [f"yes yes{end}".strip(), f"no é 肺{end}".strip()]
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 5


def test_ids_are_those_of_the_whole_rendered_conversation(tokenizer):
    template = multimodal_template(TEMPLATE)
    encoder = ConversationEncoder(tokenizer, template, image_tokens=1)
    messages = [make_message(*turn) for turn in TURNS]
    plain = [{"role": m.role, "content": [p.model_dump() for p in m.content]} for m in messages]
    text = tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False)
    assert encoder(messages)[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


THINKING = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


def test_a_question_is_asked_as_it_was_trained(tokenizer, tmp_path):
    """Qwen3's template puts an empty block of thoughts before the last answer, and asks without it by default."""
    template = multimodal_template(THINKING)
    plain = [{"role": "user", "content": "a"}]
    ask = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    assert not tokenizer.apply_chat_template(plain, **ask).endswith("<think></think>")
    chosen = asked_as_trained(tokenizer, template)
    assert tokenizer.apply_chat_template(plain, **{**ask, "chat_template": chosen}).endswith("<think></think>")
    for other in (multimodal_template(TEMPLATE), multimodal_template(None)):
        assert asked_as_trained(tokenizer, other) == other
    (tmp_path / "thinking").mkdir()
    tokenizer.save_pretrained(tmp_path / "thinking")
    (tmp_path / "thinking/chat_template.jinja").write_text(THINKING)
    path = make_recipe(tmp_path, model__language_model__tokenizer=str(tmp_path / "thinking"))
    parts = build_components(load_recipe(str(path)).llava)
    assert parts.chat_template.startswith("{%- set enable_thinking = false -%}")
    always = THINKING.replace("enable_thinking is defined and not enable_thinking", "false")
    with pytest.raises(UserError, match="otherwise than it was trained"):
        asked_as_trained(tokenizer, multimodal_template(always))


def test_a_template_that_prints_the_date_gives_the_same_text_every_day(tokenizer):
    dated = multimodal_template("{{ 'Today: ' + strftime_now('%d %b %Y') + eos_token }}" + TEMPLATE)
    ids, _ = ConversationEncoder(tokenizer, dated, 1)([make_message(*turn) for turn in TURNS])
    expected = tokenizer(f"Today: 01 Jan 2025{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    assert ids[: len(expected)] == expected


def test_of_several_templates_the_default_one_is_taken(tokenizer):
    several = SimpleNamespace(name_or_path="x", chat_template={"default": TEMPLATE, "tool_use": "{{ 1 }}"})
    assert plain_template(several) == TEMPLATE
    several.chat_template.pop("default")
    with pytest.raises(UserError, match="has chat templates tool_use, and no default one"):
        plain_template(several)


def test_a_template_without_an_end_of_turn_is_refused(tokenizer):
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    encoder = ConversationEncoder(tokenizer, multimodal_template(endless), 1)
    with pytest.raises(UserError, match="eos_token"):
        encoder([make_message(*turn) for turn in TURNS])


@pytest.mark.parametrize("size", [(40, 40), (97, 61), (50, 133)])
@pytest.mark.parametrize(
    "processor",
    [
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ],
    ids=["siglip", "clip"],
)
def test_pixels_equal_the_exported_image_processors(tmp_path, processor, size):
    Image.effect_noise(size, 80).save(tmp_path / "x.png")
    ours = ImageTransform(processor, exact=True)((tmp_path / "x.png").read_bytes(), "x")
    its = processor(Image.open(tmp_path / "x.png").convert("RGB"), return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    assert ours.dtype == torch.uint8
    assert torch.allclose((ours / 255 - mean) / std, its, atol=1e-5)


def test_padding_free_rows_restart_positions_and_never_predict_across_segments():
    samples = [Encoded([5, 6, 7], [5, 6, 7]), Encoded([8, 9], [8, 9])]
    batch = collate(samples, 0, 32, padding_free=True)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7, IGNORE, 9]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1]] and batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.inputs(torch.device("cpu"))["max_seqlen"] == 3
    assert batch.attention_mask is None and batch.supervised_tokens == 3
    assert collate(samples, 0, 32, padding_free=False).supervised_tokens == 3


def test_shuffled_turns_keep_pairs_and_lead_with_the_image():
    messages = sample(0, 1, ["yes", "no", "left"])[0].messages
    turned = shuffle_turns(messages, random.Random(1))
    pairs = {(u.text, a.text) for u, a in zip(messages[::2], messages[1::2], strict=True)}
    assert {(u.text, a.text) for u, a in zip(turned[::2], turned[1::2], strict=True)} == pairs
    assert [m.n_images for m in turned if m.role == "user"] == [1, 0, 0] and turned != messages


@pytest.fixture
def dataset(tmp_path, tokenizer) -> MicroBatches:
    make_shards(tmp_path / "shards")
    conversation = ConversationEncoder(tokenizer, multimodal_template(TEMPLATE), 4)
    encoder = SampleEncoder(conversation, ImageTransform(SiglipImageProcessor(size={"height": 32, "width": 32})), 60)
    rows = partial(collate, pad_id=3, image_size=32, padding_free=False)
    return MicroBatches(ShardReader(tmp_path / "shards"), encoder, rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_whatever_the_workers(dataset, workers):
    work = [[(3, 0), (4, 0)], [], [(5, 0)]]
    batches = list(load_batches(dataset, iter(work), workers))
    assert [b.keys for b in batches] == [["s0003", "s0004"], [], ["s0005"]]
    assert batches[1].supervised_tokens == 0 and batches[1].pixel_values.shape == (0, 1, 32, 32)


def test_unusable_samples_keep_their_place_and_are_named(dataset):
    batch = dataset[[(0, None), (9, None)]]  # the tenth has the longest answer: over 60 tokens
    assert batch.keys == ["s0000", "s0009"]
    assert [key for key, _ in batch.quarantined] == ["s0009"]
    assert "exceed data.max_length=60" in batch.quarantined[0][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "refers to 1 image"),
        ({"messages": [{"role": "assistant", "content": "  "}]}, "non-empty text"),
        ({"messages": []}, "nothing to learn from: neither a conversation, nor a report, nor images with a label"),
        ({"messages": [], "report": {"findings": " "}}, "nothing to learn from"),
        ({"messages": [], "labels": {"Edema": None}}, "nothing to learn from"),
        ({"messages": [], "images": [], "labels": {"Edema": 1}}, "nothing to learn from"),
        ({"lables": {}}, "lables"),
        ({"split": "dev"}, "split"),
        ({"boxes": [{"label": "x", "xyxy": [0, 0, 1, 1], "image": 4}]}, "refers to image 4"),
    ],
)
def test_schema_errors_name_the_file_and_the_field(change, message):
    record = json.loads(sample(0, 1, ["yes"])[0].model_dump_json()) | change
    with pytest.raises(UserError, match=message) as error:
        parse_sample(json.dumps(record), "a.tar:s.json")
    assert "a.tar:s.json" in str(error.value)


def test_an_undecodable_image_is_named(dataset):
    with pytest.raises(UserError, match="image 0: image cannot be decoded"):
        dataset.encoder(*(lambda s, m: (s, [b"not an image"]))(*sample(0, 1, ["yes"])))
    with pytest.raises(UserError, match="cannot be decoded"):
        dataset.encoder(sample(0, 1, ["yes"])[0], [png(0)[:200]])
