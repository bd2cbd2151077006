# The commands of docs/first-hour.md, in the same order. Run it where examples/ is; it writes the folder first-hour.
set -eu

python examples/first_hour/prepare.py first-hour ${QUESTIONS:-40}

prunepath sparsify first-hour/base --tau 0.9 ${SETTINGS:---calibration-tokens 2048} -o first-hour/untrained

python examples/first_hour/train.py first-hour/base first-hour/untrained first-hour/adapter ${STEPS:-60}

python examples/first_hour/merge.py first-hour/adapter first-hour/trained

export HF_HUB_OFFLINE=1
prunepath-eval --model hf --model_args pretrained=first-hour/base \
  --tasks help_text,help_next --include_path first-hour/tasks --device cpu --batch_size 4 \
  --output_path first-hour/results/dense
prunepath-eval --model prunepath --model_args pretrained=first-hour/untrained,tau=0.8 \
  --tasks help_text,help_next --include_path first-hour/tasks --device cpu --batch_size 4 \
  --output_path first-hour/results/untrained-0.8
for tau in 1 0.9 0.8; do
  prunepath-eval --model prunepath --model_args pretrained=first-hour/trained,tau=$tau \
    --tasks help_text,help_next --include_path first-hour/tasks --device cpu --batch_size 4 \
    --output_path first-hour/results/trained-$tau
done
python examples/first_hour/table.py first-hour/results

python examples/first_hour/generate.py first-hour/trained
