"""One self-contained HTML file: loss curves, scores beside their controls, and example images with answers."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvlm.errors import UserError
from medvlm.evaluation import TASKS
from medvlm.evaluation.questions import Reader
from medvlm.inference.images import decode_image

MAX_POINTS = 400  # of a loss curve; longer ones are averaged in equal pieces
MAX_SIDE = 320  # pixels of an example image
INK, ACCENT, SOFT = "#1f2933", "#0b6e99", "#a9cfe0"

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1f2933; --soft: #616e7c; --line: #e1e6eb; --accent: #0b6e99; --good: #1a7f4b; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f7f8fa; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; }
p.lead, p.note { color: var(--soft); margin: 0 0 .8rem; } p.note { font-size: .9rem; }
.banner { background: #fff4d6; border-left: 4px solid #d99a00; padding: .7rem 1rem; margin: 1.2rem 0; }
.panel { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; overflow-x: auto; }
.panel svg { max-width: 100%; height: auto; display: block; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { font-size: .82rem; color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; white-space: nowrap; } tr.control td { color: var(--soft); }
tr.score td { font-weight: 600; } td.sub { padding-left: 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.pictures { background: #10151a; display: flex; justify-content: center; height: 200px; }
.pictures img { max-width: 100%; max-height: 200px; object-fit: contain; min-width: 0; }
.card dl { margin: 0; padding: .8rem 1rem 1rem; font-size: .92rem; }
dt { color: var(--soft); font-size: .78rem; } dd { margin: 0 0 .45rem; overflow-wrap: anywhere; }
dd.question { font-weight: 600; } .right { color: var(--good); } .wrong { color: var(--bad); }
.mark { font-size: .78rem; font-weight: 600; }
</style></head><body><main>
<h1>{{ title }}</h1>
<p class="lead">{{ results.n }} questions ({{ results.n_closed }} closed, {{ results.n_open }} open) about
{{ results.n_groups }} patients or images · task {{ results.task }} · model {{ results.model }}</p>
{% if results.synthetic %}<div class="banner"><strong>Synthetic data.</strong> The images and questions are generated
phantoms. These numbers show that the pipeline works; they say nothing about patients.</div>{% endif %}
{% if curves %}<h2>Loss</h2><div class="panel">{{ curves | safe }}</div>{% endif %}
{% if training %}<div class="panel" style="margin-top:1rem"><table><tr><th>run</th><th class="n">steps</th>
<th class="n">first loss</th><th class="n">last loss</th><th class="n">last evaluation loss</th>
<th class="n">tokens/s (median)</th></tr>
{% for r in training %}<tr><td>{{ r.name }}</td><td class="n">{{ r.steps }}</td><td class="n">{{ r.first }}</td>
<td class="n">{{ r.last }}</td><td class="n">{{ r.evaluation }}</td><td class="n">{{ r.speed }}</td></tr>{% endfor %}
</table></div>{% endif %}
<h2>Scores beside their controls</h2>
<p class="note">In per cent. Indented grey lines are controls: what the same questions score without looking at the
right image. A gain whose interval holds 0 is no evidence that the model uses the image. Intervals are 95 % bootstrap
intervals that draw whole patients.</p>
<div class="panel"><table>
<tr><th>measure</th><th class="n">value</th><th class="n">95 % interval</th><th class="n">n</th></tr>
{% for row in rows %}<tr class="{{ 'control' if row.control else '' if row.label[0] == ' ' else 'score' }}">
<td{% if row.label[0] == ' ' %} class="sub"{% endif %}>{{ row.label.strip() }}</td><td class="n">{{ row.shown }}</td>
<td class="n">{{ row.interval_shown }}</td><td class="n">{{ row.n }}</td></tr>{% endfor %}</table></div>
{% if results.by_question_type and results.by_question_type | length > 1 %}
<h2>By question type</h2><div class="panel"><table>
<tr><th>type</th><th class="n">n</th><th class="n">closed accuracy</th><th class="n">open token recall</th></tr>
{% for name, t in results.by_question_type.items() %}<tr><td>{{ name }}</td><td class="n">{{ t.n }}</td>
<td class="n">{{ percent(t.closed_accuracy) }}</td><td class="n">{{ percent(t.open_token_recall) }}</td></tr>
{% endfor %}
</table></div>{% endif %}
{% if cards %}<h2>Examples</h2>
<p class="note">Taken at equal distances through the questions with images, not chosen by their answers.</p>
<div class="cards">{% for c in cards %}<article class="card"><div class="pictures">{% for image in c.images %}
<img alt="image {{ loop.index }} of {{ c.row.key }}" src="data:image/png;base64,{{ image }}">{% endfor %}</div><dl>
<dt>question</dt><dd class="question">{{ c.row.question }}</dd><dt>gold answer</dt><dd>{{ c.row.gold }}</dd>
<dt>model</dt><dd class="{{ 'right' if c.row.correct else 'wrong' }}">{{ c.row.answer or '(empty)' }}
<span class="mark">{{ c.mark }}</span></dd>
{% if c.row.blank_answer is defined %}<dt>with a blank image</dt>
<dd>{{ c.row.blank_answer or '(empty)' }}</dd>{% endif %}
</dl></article>{% endfor %}</div>{% endif %}
{% if extra %}<h2>How this was made</h2><div class="panel"><table>{% for name, value in extra.items() %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table></div>{% endif %}
</main></body></html>
"""


def write_report(
    out_html: str | Path,
    runs: Mapping[str, str | Path],
    results: dict[str, Any],
    predictions_jsonl: str | Path,
    reader: Reader,
    examples: int = 12,
    extra: Mapping[str, Any] | None = None,
    title: str = "Medical vision-language model: training and evaluation",
) -> Path:
    """Write the report and return its path.

    ``runs`` names each run's ``metrics.jsonl``; ``results`` and ``predictions_jsonl`` are what ``evaluation.run`` gave
    for ``reader``'s shards; ``extra`` is printed as a table at the end. Raises UserError if a file is absent, or if the
    predictions are of other shards.
    """
    from jinja2 import Environment

    logs = {name: _read_lines(Path(path)) for name, path in runs.items()}
    page = Environment(autoescape=True).from_string(TEMPLATE)
    html = page.render(
        title=title,
        results=results,
        rows=TASKS[results["task"]].table(results),
        curves=_loss_curves(logs) if logs else "",
        training=[_training_row(name, lines) for name, lines in logs.items()],
        cards=_cards(_read_lines(Path(predictions_jsonl)), reader, examples),
        extra=dict(extra or {}),
        percent=lambda share: "–" if share is None else f"{100 * share:.1f}",
    )
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON lines ({error})") from error


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity, averaged in equal pieces down to MAX_POINTS."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    size = -(-len(points) // MAX_POINTS) or 1
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [sum(s for s, _ in p) / len(p) for p in pieces], [sum(v for _, v in p) / len(p) for p in pieces]


def _loss_curves(logs: Mapping[str, list[dict[str, Any]]]) -> str:
    """One panel per run: training loss as it was and smoothed, evaluation loss as dots. An inline SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "medvlm", "font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(5.2 * len(logs) if len(logs) > 1 else 8, 3.4), layout="constrained")
        for axes, (name, lines) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
            steps, losses = _series(lines, "loss")
            axes.plot(steps, losses, color=SOFT, linewidth=1, label="training")
            axes.plot(steps, _smooth(losses), color=ACCENT, linewidth=2, label="training, smoothed")
            at, values = _series(lines, "eval_loss")
            if values:
                axes.plot(at, values, "o", color="#d1495b", markersize=5, label="evaluation")
            axes.set(title=name, xlabel="step", ylabel="loss per supervised token (nats)")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e1e6eb", linewidth=0.8)
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue, which HTML does not allow


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the curve, fewer points at its ends: unlike an exponential average, no lag."""
    half = max(1, len(values) // 40)
    windows = [
        values[max(0, i - w) : i + w + 1] for i in range(len(values)) for w in [min(half, i, len(values) - 1 - i)]
    ]
    return [sum(window) / len(window) for window in windows]


def _training_row(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    speeds = sorted(line["tokens_per_second"] for line in lines if line.get("tokens_per_second") is not None)
    return {
        "name": name,
        "steps": max((line["step"] for line in lines), default=0),
        "first": f"{losses[0]:.3f}" if losses else "–",
        "last": f"{losses[-1]:.3f}" if losses else "–",
        "evaluation": f"{evaluations[-1]:.3f}" if evaluations else "–",
        "speed": f"{speeds[len(speeds) // 2]:.0f}" if speeds else "–",
    }


def _cards(rows: list[dict[str, Any]], reader: Reader, examples: int) -> list[dict[str, Any]]:
    """Examples at equal distances through the samples with images; each takes another of its sample's questions."""
    by_sample: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["images"]:
            by_sample.setdefault(row["sample_index"], []).append(row)
    places = sorted(by_sample)
    count = min(examples, len(places))
    cards = []
    for i in range(count):
        index = places[i * len(places) // count]
        row = by_sample[index][i % len(by_sample[index])]
        if index >= len(reader) or reader.sample(index).key != row["key"]:
            raise UserError(f"the predictions are not of these shards: sample {index} is not {row['key']!r}")
        right = "✓ right" if row["correct"] else "✗ wrong"
        if not row["correct"] and row["answer_type"] == "open":
            right = f"✗ not exact, token recall {row['token_recall']:.2f}"
        images = [_thumbnail(data, row["key"]) for data in reader.images(index)]
        cards.append({"row": row, "mark": right, "images": images})
    return cards


def _thumbnail(data: bytes, where: str) -> str:
    image = decode_image(data, where)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
