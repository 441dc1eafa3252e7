"""Last step of quickstart.sh: gathers what the steps left behind into summary.json and report.html."""

import json
import statistics
import sys
from pathlib import Path

import yaml

from medvlm.data.shards import ShardReader
from medvlm.evaluation.report import write_report


def stage(folder: Path) -> dict:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    manifest = json.loads((sorted(folder.glob("checkpoints/step-*/medvlm.json"))[-1]).read_text())
    return {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "evaluation_loss": [row["eval_loss"] for row in rows if "eval_loss" in row][-1],
        "steps": steps[-1]["step"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "supervised_tokens": sum(row["supervised_tokens"] for row in steps),
        "world_size": manifest["world_size"],
        "zero_stage": manifest["zero_stage"],
    }


def main(out: Path) -> None:
    results = json.loads((out / "evaluation" / "results.json").read_text())
    seconds = {f.name.removeprefix(".done-"): int(f.read_text()) for f in sorted(out.glob(".done-*"))}
    stages = {name: stage(out / name) for name in ("stage1", "stage2")}
    summary = {
        "train": stages,
        "export": json.loads((out / "export.json").read_text()),
        "eval": results,
        "seconds": {**seconds, "total": sum(seconds.values())},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    reader = ShardReader(out / "data" / "test")
    recipe = yaml.safe_load((out / "stage2" / "config.yaml").read_text())
    write_report(
        out / "report.html",
        {name: out / name / "metrics.jsonl" for name in stages},
        results,
        out / "evaluation" / "predictions.jsonl",
        reader,
        extra={"recipe": recipe["description"], **{f"seconds: {k}": v for k, v in summary["seconds"].items()}},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
