#!/usr/bin/env bash
# Trains under Slurm, one process for each GPU; docs/pods.md has an example.
#
#   sbatch [FLAG ...] tools/slurm.sh [ARGUMENT OF train.py ...]
#   tools/slurm.sh --dry_run [ARGUMENT OF train.py ...]     prints the command and runs none
#
# What sbatch is given (--nodes=4, --time=...) replaces what is set here. PYTHON is the interpreter; else .venv's, else
# python3.
#SBATCH --job-name=dpa_jax
#SBATCH --output=%x-%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Every process must see all GPUs of its node and takes the one of its number there, as JAX does under Slurm: so
# --gpus-per-node, and neither --gpus-per-task nor --gpu-bind.
python=${PYTHON:-python3}
[[ ! ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
command=(srun --kill-on-bad-exit=0 "$python" train.py --distributed)
if [[ ${1:-} == --dry_run ]]; then
    shift
    printf '%q ' "${command[@]}" "$@"
    echo
else
    exec "${command[@]}" "$@"
fi
