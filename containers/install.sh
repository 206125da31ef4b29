#!/bin/sh
# Makes the environment of the training stages in an image of Debian or Ubuntu. train.def and Dockerfile both run it, as
# root, so that the two images cannot drift: install.sh FOLDER, which holds requirements as envs/ has them.
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
# Triton compiles its kernels at first use: that takes a C compiler and Python's headers.
apt-get install --quiet --yes --no-install-recommends \
    bash ca-certificates gcc libc6-dev python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install.sh: the base image has $(python3 --version), and Moult needs 3.11 or newer: choose another BASE_IMAGE" >&2
    exit 1
}
python3 -m venv /opt/moult
# torch's wheel brings CUDA's libraries. Snakemake is there for those who run the whole workflow in Docker.
/opt/moult/bin/python -m pip install --no-cache-dir --constraint "$1/constraints.txt" \
    --requirement "$1/workflow.txt" --requirement "$1/train.txt"
/opt/moult/bin/python -m pip check
