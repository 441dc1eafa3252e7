"""FLOPs of a step beside torch.utils.flop_counter, which counts what is executed."""

from collections import Counter
from functools import partial

import pytest
import torch
from dual_toy import BERT, RESNET, SWIN, VIT, dual_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy import CLIP, LLAMA, make_recipe, make_tokenizer

from medvlm.config.load import load_recipe
from medvlm.config.model import Llava
from medvlm.config.objective import MaskedLanguageModeling, Objective
from medvlm.config.schema import RunConfig
from medvlm.data.loader import Encoded, collate
from medvlm.models.build import build_components, build_model
from medvlm.models.build_dual_encoder import build_components as build_dual_components
from medvlm.models.build_dual_encoder import build_model as build_dual_model
from medvlm.models.trainable import apply_trainable
from medvlm.training import peak
from medvlm.training.families.dual_encoder import DUAL_ENCODER
from medvlm.training.families.llava import LLAVA
from medvlm.training.flops import CostRecorder, attended_pairs, attention_windows
from medvlm.training.flops import work as work_of

LENGTHS = (30, 12, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flops")
    make_tokenizer(folder / "tokenizer")
    return folder


def build(folder, **overrides):
    """Wide enough that rotary frequencies, which the counter counts and we do not, are far below 1 %."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    options = {
        "model__language_model__config": {**LLAMA, **wide},
        "model__vision_tower__config": {**CLIP, "hidden_size": 64},
        **overrides,
    }
    config = load_recipe(str(make_recipe(folder, **options)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    apply_trainable(model, config.model, parts.unused)
    return model, parts


def batch(parts, lengths=LENGTHS, images=(1, 0, 2), padding_free=True):
    samples = []
    for n, count in zip(lengths, images, strict=True):
        ids = [parts.image_token_id] * (count * parts.image_tokens)
        ids += [7] * (n - len(ids))
        pictures = [torch.zeros(1, parts.image_size, parts.image_size, dtype=torch.uint8)] * count
        samples.append(Encoded(ids, [-100] * (n - 6) + ids[-6:], pictures))
    return collate(samples, 3, parts.image_size, padding_free)


def record(model, unused):
    return CostRecorder(model, Llava.PARTS, LLAVA.unit, unused)


def work(model, made, lengths=LENGTHS):
    pairs = {w: attended_pairs(lengths, w) for w in attention_windows(model.language_model.config)}
    return work_of({"tokens": sum(lengths), "targets": made.targets, "images": made.images}, pairs)


def counted(model, made, backward=True) -> Counter:
    """SDPA as matmuls, which the counter sees on a CPU too."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(**made.inputs(torch.device("cpu")))
        if backward:
            loss.backward()
    return Counter({str(key): value for key, value in counter.get_flop_counts()["Global"].items()})


FROZEN = {"model__vision_tower__train": "frozen", "model__language_model__train": "frozen"}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model__vision_tower__train": "frozen"},
        FROZEN,
        {"model__language_model__train": "frozen"},
        {**FROZEN, "model__multi_modal_projector__train": "frozen", "model__language_model__train": "norm_and_bias"},
        {"model__vision_tower__train": "frozen", "model__multi_modal_projector__train": "frozen"},
        {**FROZEN, "model__language_model__train": "lora"},
        {"model__language_model__config": {**LLAMA, "hidden_size": 128, "tie_word_embeddings": True}},
    ],
    ids=["all", "tower-frozen", "projector", "language-frozen", "norms", "language", "lora", "tied"],
)
def test_a_packed_step_costs_what_the_counter_counts(folder, overrides):
    model, parts = build(folder, **overrides)
    made = batch(parts)
    recorder = record(model, parts.unused)
    found = sum(counted(model, made).values())
    costs = recorder.costs.of(work(model, made))
    assert sum(cost.model for cost in costs.values()) == pytest.approx(found, rel=0.01)
    assert recorder.handles[0].id not in model._forward_pre_hooks, "it watches one pass only"
    with torch.no_grad():
        forward = sum(counted(model, made, backward=False).values())
    assert sum(cost.forward for cost in costs.values()) == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_blank_images_do_not_count(folder, attention):
    """One row without padding is counted exactly; padding adds to what is executed and not to the model's FLOPs."""
    model, parts = build(folder, model__attention=attention)
    recorder = record(model, parts.unused)
    whole = batch(parts, (32,), (1,), padding_free=False)
    found = sum(counted(model, whole).values())
    assert sum(c.model for c in recorder.costs.of(work(model, whole, (32,))).values()) == pytest.approx(found, rel=0.01)
    padded = batch(parts, (32, 8), (0, 0), padding_free=False)
    ours = recorder.costs.of(work(model, padded, (32, 8)))
    assert ours["vision_tower"].model == ours["multi_modal_projector"].model == 0
    assert sum(c.model for c in ours.values()) < 0.8 * sum(counted(model, padded).values())


def test_layers_that_no_feature_depends_on_do_not_count(folder):
    last, parts = build(folder)
    before, fewer = build(folder, model__vision_tower__feature_layer=-2)
    images = []
    for model, unused in ((last, parts.unused), (before, fewer.unused)):
        recorder = record(model, unused)
        model(**batch(parts).inputs(torch.device("cpu")))
        images.append(recorder.costs.parts["vision_tower"]["images"].forward)
    tokens = 5  # four patches and a class token
    layer = tokens * 2 * 6 * 64 * 64 + 4 * 64 * tokens**2
    assert images[0] - images[1] == layer


def test_recomputation_counts_as_hardware_flops_only(folder):
    plain, parts = build(folder)
    repeating, _ = build(folder, model__language_model__gradient_checkpointing=True)
    totals = []
    for model in (plain, repeating):
        made = batch(parts)
        recorder = record(model, parts.unused)
        executed = sum(counted(model, made).values())
        costs = recorder.costs.of(work(model, made)).values()
        totals.append([sum(c.model for c in costs), sum(c.hardware for c in costs), executed])
    (model_flops, hardware, _), (same, repeated, executed) = totals
    assert model_flops == same == hardware
    assert repeated == pytest.approx(executed, rel=0.01)


def test_active_experts_only(folder):
    """Mixtral: two of eight experts. By arithmetic, as the counter does not know grouped matmuls."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2}
    model, parts = build(folder, model__language_model__config={**LLAMA, **sizes, "model_type": "mixtral"})
    recorder = record(model, parts.unused)
    model(**batch(parts).inputs(torch.device("cpu")))
    attention = 2 * 64 * (64 + 32 + 32 + 64)
    experts, router = 2 * 3 * 2 * 64 * 96, 2 * 64 * 8
    assert recorder.costs.parts["language_model"]["tokens"].forward == 2 * (attention + experts + router)


def test_windows_and_pairs():
    from transformers import Gemma2Config, LlamaConfig, MistralConfig

    assert attention_windows(LlamaConfig(num_hidden_layers=2)) == (None,)
    assert attention_windows(MistralConfig(num_hidden_layers=2, sliding_window=9)) == (9,)
    assert attention_windows(Gemma2Config(num_hidden_layers=4, sliding_window=7)) == (7, None)
    assert attended_pairs((3, 5), None) == 9 + 25
    assert attended_pairs((3, 5), 4) == 9 + 20


def test_evaluation_before_training_is_not_recorded(folder):
    model, parts = build(folder)
    recorder = record(model, parts.unused)
    with torch.no_grad():
        model(**batch(parts).inputs(torch.device("cpu")))
    assert not recorder.done
    model(**batch(parts).inputs(torch.device("cpu")))
    assert recorder.done and recorder.costs.parts["language_model"]["tokens"].backward > 0


def test_the_peak_is_a_datasheets_or_measured():
    assert peak.datasheet_peak("NVIDIA H100 80GB HBM3", torch.bfloat16).flops == 989e12
    assert peak.datasheet_peak("NVIDIA H100 PCIe", torch.bfloat16).flops == 756e12
    assert peak.datasheet_peak("NVIDIA H200", torch.bfloat16).line().endswith("datasheet: NVIDIA H200, bf16 dense")
    assert peak.datasheet_peak("NVIDIA H100 80GB HBM3 MIG 3g.40gb", torch.bfloat16) is None
    assert peak.datasheet_peak("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak.datasheet_peak("NVIDIA T4", torch.bfloat16) is None
    measured = peak.peak_of(torch.device("cpu"), torch.float32)
    assert measured.source == "measured" and 1e9 < measured.flops < 1e14


@pytest.mark.parametrize("vision", [VIT, SWIN, RESNET], ids=["vit", "swin", "resnet"])
@pytest.mark.parametrize("masked", [None, MaskedLanguageModeling(probability=0.3)], ids=["contrast", "masked"])
def test_a_dual_encoder_costs_what_the_counter_counts(tmp_path, vision, masked):
    wide = {"hidden_size": 64, "intermediate_size": 128}
    vision = {**vision, **wide} if vision is VIT else vision
    config = dual_config(tmp_path, vision, {**BERT, **wide})
    objective = Objective(masked_language_modeling=masked)
    parts = build_dual_components(config, objective)
    model = build_dual_model(config, parts, torch.float32)
    ids = torch.full((3, 24), 7)
    made = {"pixel_values": torch.zeros(3, 3, 32, 32, dtype=torch.uint8), "input_ids": ids}
    if masked:
        labels = torch.full_like(ids, -100)
        labels[:, :5] = 7
        made |= {"masked_ids": ids, "masked_labels": labels}
    recorder = CostRecorder(model, config.PARTS, DUAL_ENCODER.unit, parts.unused)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(value.sum() for value in model(**made).values()).backward()
    texts = 6 if masked else 3  # as they are, and masked
    counts = {"images": 3, "tokens": 24 * 3, "texts": 3, "masked_tokens": 15, "targets": 3}
    done = work_of(counts, {None: attended_pairs([24] * texts, None)})
    found = counter.get_total_flops()
    assert sum(cost.model for cost in recorder.costs.of(done).values()) == pytest.approx(found, rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**{name: value for name, value in made.items() if not name.startswith("masked_")})
    run = RunConfig.model_construct(objective=objective, model=config)
    again = recorder.costs.of(done, partial(DUAL_ENCODER.repeated, run, 2)).values()
    assert sum(cost.again for cost in again) == pytest.approx(counter.get_total_flops(), rel=0.01)
