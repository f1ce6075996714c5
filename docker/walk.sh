#!/usr/bin/env bash
# Builds the image without a Docker engine and without a registry, then starts what is in it: needs root, buildah and
# debootstrap, 30 GB of disk for a while, and several minutes. A Debian made here, with its own Python, stands in for
# the base image, so that every instruction of the Dockerfile is carried out; the base image itself is not what is tried.
#   docker/walk.sh FOLDER        FOLDER is made, and left for a look; PIP_CONFIG_FILE is used in the build if it is set
set -euo pipefail
folder=$(realpath -m "${1:?a folder to work in}")
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
mkdir -p "$folder/base"
build=(buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver vfs)
export BUILDAH_ISOLATION=chroot

[ -e "$folder/tree/bin/sh" ] || debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,ca-certificates bookworm "$folder/tree" >"$folder/debootstrap.log"
cp -r /etc/apt/sources.list* "$folder/tree/etc/apt/" 2>/dev/null || true
cp /etc/ssl/certs/ca-certificates.crt "$folder/tree/etc/ssl/certs/ca-certificates.crt"
[ -z "${PIP_CONFIG_FILE:-}" ] || cp "$PIP_CONFIG_FILE" "$folder/tree/etc/pip.conf"
chroot "$folder/tree" python3 -m venv /opt/python
tar -C "$folder/tree" -cf "$folder/base/base.tar" .
printf 'FROM scratch\nADD base.tar /\nENV PATH=/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n' >"$folder/base/Dockerfile"
"${build[@]}" bud --layers=false -t base "$folder/base"
"${build[@]}" bud --layers=false --format docker --from localhost/base -t hypersam -f "$root/docker/Dockerfile" "$root"
"${build[@]}" images

container=$("${build[@]}" from --pull-never localhost/hypersam)
trap '"${build[@]}" rm "$container" >/dev/null' EXIT
"${build[@]}" run "$container" -- hypersam doctor
# The image's command, its health check, and a worker that compresses the model that the package carries.
"${build[@]}" run --env HYPERSAM_PORT=18765 --env HYPERSAM_HOST=127.0.0.1 "$container" -- bash -euo pipefail -c '
    [ "$(id -u)" = 10001 ]
    hypersam serve --workers 0 & api=$!
    ask() { python -c "import sys, urllib.request as u; sys.stdout.write(u.urlopen(\"http://127.0.0.1:18765$1\").read().decode())"; }
    for _ in $(seq 60); do ask /healthz >/dev/null 2>&1 && break; sleep 1; done
    export HYPERSAM_REDIS_URL=unix:///data/redis/redis.sock
    python -m workers & worker=$!
    for _ in $(seq 120); do ask /models | grep -q small_sam && break; sleep 1; done
    ask /models | grep -q small_sam
    python -m workers.alive
    kill "$worker"; wait "$worker"
    kill "$api"; wait "$api"'
echo "the image was built, and works"
