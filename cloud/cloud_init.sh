#!/usr/bin/env bash
# Train on a rented machine and keep the output folder in a bucket, for any provider.
#
#   cloud/cloud_init.sh BUCKET OUTPUT SCRIPT [FLAGS]
#   cloud/cloud_init.sh s3:my-bucket/run outputs/my_edit train_qwen_edit.py \
#       --config configs/qwen_edit_pairs.yaml --train.resume_from_checkpoint latest
#
# BUCKET is a place of rclone (`rclone config`, or RCLONE_CONFIG_S3_TYPE=s3
# RCLONE_CONFIG_S3_ENV_AUTH=true for s3:); OUTPUT the folder that the flags let the script write.
# What is in the bucket is fetched, the run goes on, and every minute and at the end OUTPUT is
# copied; nothing in the bucket is deleted. Exit code 0: the run is done. 143: SIGTERM (the machine
# is taken away), the run has saved and is in the bucket; the same command goes on elsewhere.
# PYTHON=... takes an environment that is there; without it .venv is made and filled.
#
# As user data of a machine, which sends SIGTERM to this script before its network goes:
#
#   #!/bin/bash
#   git clone <this repository> /opt/edit
#   systemd-run --unit train -p After=network-online.target -p KillMode=mixed \
#       -p TimeoutStopSec=110 -p WorkingDirectory=/opt/edit bash cloud/cloud_init.sh BUCKET ...
set -euo pipefail

fail() {
    echo "cloud_init.sh: $1" >&2
    exit 2
}

[[ $# -ge 3 ]] || fail "usage: cloud_init.sh BUCKET OUTPUT SCRIPT [FLAGS]"
bucket=$1 output=$2
shift 2
cd "$(dirname "$0")/.."
[[ -f $1 ]] || fail "no script $1"
[[ "$*" =~ resume_from_checkpoint[\ =]latest ]] ||
    fail "give the script resume_from_checkpoint latest, or the next machine starts from zero"

install() { # as root of a Debian or Ubuntu; elsewhere install rclone and set PYTHON
    apt-get update && apt-get install -y "$@"
}

command -v rclone >/dev/null || install rclone || fail "rclone is not installed"
if [[ -z ${PYTHON:-} ]]; then
    [[ -x .venv/bin/python ]] || python3 -m venv .venv || { install python3-venv && python3 -m venv .venv; }
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip install -q -r requirements.txt
fi

keep() { # the lock is this machine's own; what has no final name is not finished
    rclone copy "$output" "$bucket" --exclude "/.lock" --exclude "*.tmp" --exclude "*.tmp/**"
}

mkdir -p "$output"
rclone mkdir "$bucket" && rclone copy "$bucket" "$output" || fail "cannot read the bucket $bucket"

stopped=0
trap 'stopped=1; kill -TERM "$trainer" 2>/dev/null || true' TERM
"$PYTHON" "$@" &
trainer=$!
while sleep "${EVERY:-60}"; do keep || true; done &
copier=$!
status=0
wait "$trainer" || status=$?
while kill -0 "$trainer" 2>/dev/null; do # the signal has ended `wait`, not the trainer
    status=0
    wait "$trainer" || status=$?
done
kill "$copier" 2>/dev/null || true
keep || fail "what was saved is in $output, but not in the bucket"
[[ $status -eq 0 && $stopped -eq 1 ]] && status=143
exit "$status"
