#!/usr/bin/env bash
# Packs what `python -m benchmarks.gpu` needs on a GPU machine that has Python 3.12, torch, transformers, pyarrow and pandas
# but no network: FOLDER/site.tar.xz (diffusers, deepspeed, a slimmed Ray, pydantic and small ones) and
# FOLDER/project.tar.gz, at most 64 MiB together.
#   benchmarks/gpu/pack_offline.sh FOLDER        in the project's root, with a ready .venv, everything committed
#   EXTRA="flash-attn-4==4.0.0b36 nvidia-cutlass-dsl==4.8.1"    more wheels, for Linux on x86_64 and Python 3.12
#   WITHOUT="ray"                                names that are left out, where EXTRA needs the room
# There:  mkdir -p /opt/site /opt/p && tar xJf site.tar.xz -C /opt/site && tar xzf project.tar.gz -C /opt/p && cd /opt/p &&
#         PYTHONPATH=/opt/site:/opt/p HF_HUB_OFFLINE=1 python3 -m benchmarks.gpu
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
max_bytes=$((64 * 1024 * 1024))
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
names="diffusers ray peft torchao pydantic pydantic_core webdataset braceexpand hjson jsonschema jsonschema-specifications
    referencing rpds-py importlib_metadata typing-inspection annotated-types rich markdown-it-py mdurl pygments"
pins=""
for name in $names; do
    case " ${WITHOUT:-} " in *" $name "*) continue ;; esac
    pins="$pins $(grep -i "^$name==" requirements.lock)"
done
platforms=""
for tag in manylinux_2_28 manylinux_2_17 manylinux2014 manylinux1; do platforms="$platforms --platform ${tag}_x86_64"; done
# shellcheck disable=SC2086 # lists of words
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    -d "$work/wheels" $pins ${EXTRA:-} 2> "$work/pip.log" || { cat "$work/pip.log"; exit 1; }
mkdir "$work/site"
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
rm -rf "$work"/site/ray/{jars,rllib,cpp,dashboard/client}
find "$work/site/torchao" -name '*.so' -delete  # of other versions of torch, and FP8 training has none
for binary in "$work"/site/ray/core/src/ray/gcs/gcs_server "$work"/site/ray/core/src/ray/raylet/raylet; do
    [ ! -e "$binary" ] || { chmod +x "$binary"; strip -s "$binary" || true; }
done
[ ! -e "$work/site/ray/_raylet.so" ] || strip -s "$work/site/ray/_raylet.so" || true
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$packages"/deepspeed "$packages"/deepspeed-*.dist-info "$work/site/"  # pure Python: it has no wheel of its own
find "$work/site" -name __pycache__ -prune -exec rm -rf {} +
tar c -C "$work/site" . | xz -T0 -6 > "$out/site.tar.xz"
git archive HEAD | gzip > "$out/project.tar.gz"
ls -l "$out"
size=$(($(stat -c %s "$out/site.tar.xz") + $(stat -c %s "$out/project.tar.gz")))
[ "$size" -le "$max_bytes" ] || { echo "pack_offline: $size bytes are more than $max_bytes: use WITHOUT" >&2; exit 1; }
