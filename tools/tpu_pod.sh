#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs; docs/pods.md has an example.
#
#   tools/tpu_pod.sh [--dry_run] COMMAND [ARGUMENT ...]
#
#   create [FLAG ...]     asks for the slice, and waits until it is there; flags are those of gcloud, such as --spot
#   install               copies this clone to all workers, as it is committed, and installs it there
#   run COMMAND           runs a command of the shell on all workers, in the folder of the clone
#   start [ARGUMENT ...]  starts train.py on all workers, in the background, with these arguments; or goes on
#   log                   follows what worker 0 writes
#   stop                  lets all workers save and stop
#   resume [FLAG ...]     after a preemption: delete, create and install; then start it with the arguments of before
#   fetch [FOLDER]        copies the run's folder from the bucket to a local one, runs/NAME
#   delete                gives the slice back
#
# --dry_run prints the commands and runs none. The environment says which slice:
#   POD          its name
#   ZONE         such as us-west4-a
#   ACCELERATOR  its kind and size, such as v5litepod-16; for `create`
#   RUNTIME      its software, such as v2-alpha-tpuv5-lite; for `create`
#   WORKDIR      the run's folder, gs://BUCKET/NAME; for `start` and `fetch`
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' tools/tpu_pod.sh; }

dry_run=
if [[ ${1:-} == --dry_run ]]; then
    dry_run=1
    shift
fi

# Prints a command as it would be typed, or runs it.
run() {
    local argument line=
    if [[ ! $dry_run ]]; then
        "$@"
        return
    fi
    for argument in "$@"; do
        if [[ ! $argument =~ ^[][A-Za-z0-9_./:=@,+~-]+$ ]]; then
            argument="'${argument//\'/\'\\\'\'}'"
        fi
        line+="$argument "
    done
    echo "${line% }"
}

queue() { run gcloud compute tpus queued-resources "$1" "$POD" --zone="$ZONE" "${@:2}"; }

# on WORKER COMMAND: WORKER is a number or `all`
on() { run gcloud compute tpus tpu-vm ssh "$POD" --zone="$ZONE" --worker="$1" --command="$2"; }

create() {
    : "${ACCELERATOR:?must be the kind and size of the slice, such as v5litepod-16}"
    : "${RUNTIME:?must be its software, such as v2-alpha-tpuv5-lite}"
    queue create --node-id="$POD" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "$@"
    wait_for_it
}

wait_for_it() {
    local state
    while true; do
        state=$(queue describe '--format=value(state.state)')
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING)
                echo "error: $POD is $state; tools/tpu_pod.sh resume asks for it anew" >&2
                exit 1
                ;;
            gcloud*) # a dry run's
                echo "$state  # again and again until it says ACTIVE"
                return
                ;;
        esac
        echo "$POD is $state" >&2
        sleep 30
    done
}

install() {
    local uv=.local/bin/uv
    run git archive --format=tar.gz --output=dpa_jax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp dpa_jax.tar.gz "$POD:" --zone="$ZONE" --worker=all
    run rm dpa_jax.tar.gz
    # The image's own Python may be older than 3.11.
    on all "mkdir -p dpa_jax && tar -xzf dpa_jax.tar.gz -C dpa_jax && cd dpa_jax && \
python3 -m pip install --user --quiet uv && ~/$uv venv --quiet --allow-existing --python 3.12 && \
~/$uv pip install --quiet --editable '.[train,tpu,gcs]'"
}

start() {
    local arguments
    : "${WORKDIR:?must be the folder of the run, gs://BUCKET/NAME}"
    printf -v arguments ' %q' --distributed --workdir="$WORKDIR" "$@"
    on all "cd dpa_jax && { nohup .venv/bin/python train.py$arguments >run.log 2>&1 </dev/null & echo \$! >run.pid; }"
}

fetch() {
    : "${WORKDIR:?must be the folder of the run, gs://BUCKET/NAME}"
    local folder=${1:-runs/${WORKDIR##*/}}
    run mkdir -p "$folder"
    run gcloud storage rsync --recursive "$WORKDIR" "$folder"
}

command=${1:-help}
[[ $# == 0 ]] || shift
case $command in
    help | --help | -h)
        usage
        exit
        ;;
    fetch) ;;
    *) : "${POD:?must be the name of the slice}" "${ZONE:?must be its zone, such as us-west4-a}" ;;
esac
case $command in
    create | install | start | fetch) "$command" "$@" ;;
    run) on all "cd dpa_jax && $*" ;;
    log) on 0 "tail -n 100 -F dpa_jax/run.log" ;;
    stop) on 0 "kill -TERM \$(cat dpa_jax/run.pid)" ;;
    delete) queue delete --force --quiet ;;
    resume)
        queue delete --force --quiet
        create "$@"
        install
        ;;
    *)
        echo "error: there is no command $command; tools/tpu_pod.sh --help lists them" >&2
        exit 1
        ;;
esac
