#!/usr/bin/env bash
# From nothing to a trained, exported, evaluated model: phantom radiographs, two training stages under ZeRO-3, a resume,
# a Hugging Face folder, an evaluation and a report, all in runs/quickstart. Run again, it continues where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup eval,prep
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
out=runs/quickstart
mkdir -p $out

step() { # step NAME COMMAND...: once, timed
    local name=$1; shift
    if [[ -f $out/.done-$name ]]; then echo "== $name: done before"; return; fi
    echo "== $name"
    local start=$SECONDS
    "$@"
    echo $((SECONDS - start)) > "$out/.done-$name"
}

ranks=$(gpus)
for n in 1 2 4 8; do ((n <= ranks)) && use=$n; done
given=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((${use:-1} - 1)))}
CUDA_VISIBLE_DEVICES=$(cut -d, -f"-${use:-1}" <<< "$given"); export CUDA_VISIBLE_DEVICES
micro=$((64 / (ranks ? use : 2)))
train() { run_training "$1" run.root=$out "run.name=$2" training.micro_batch_size=$micro "${@:3}"; }

step data medvlm prepare phantom $out/data --images "${IMAGES:-12000}" --size 64 --preset easy
step tokenizer medvlm prepare tokenizer $out/data/tokenizer --shards $out/data/train --vocab-size 384
step stage1 train phantom-stage1 stage1
step stage2-first-part train phantom-stage2 stage2 training.stop_after="${STOP_AFTER:-280}" # an interruption, ...
step stage2-resumed train phantom-stage2 stage2 run.resume=require                          # ... and the resume
step export bash -ec "medvlm export $out/stage2 --out $out/model --json > $out/export.partial; tail -n 1 $out/export.partial > $out/export.json; rm $out/export.partial"
step evaluate medvlm evaluate $out/model --task vqa --data $out/data/test --train-data $out/data/train --limit 1500 --max-new-tokens 8 \
    --batch-size 64 --out $out/evaluation
step report python launchers/quickstart_report.py $out
cat <<END

Made in $out:
  data/          phantom radiographs as WebDataset shards (synthetic, no patients)
  stage1, stage2 training runs: checkpoints, metrics.jsonl, tensorboard
  model/         the exported Hugging Face folder
  report.html    loss curves, scores beside controls, example answers
  summary.json   $(python -c "import json; s = json.load(open('$out/summary.json'))['eval']; print(f\"closed accuracy {s['closed_accuracy']:.3f}, majority {s['majority_accuracy']:.3f}, blank image {s['blank_image_accuracy']:.3f}, shuffled image {s['shuffled_image_accuracy']:.3f}, n {s['n']}\")")

Try next:
  .venv/bin/medvlm shards show $out/data/test --images-to $out/sample
  .venv/bin/medvlm generate $out/model --image $out/sample/\$(ls $out/sample 2>/dev/null | head -1) --prompt "left effusion ?"
  bash launchers/local.sh llava_med-stage1 --tiny
END
