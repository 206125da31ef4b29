#!/bin/sh
# Makes the Python environment of an image of Debian or Ubuntu. The definitions for Apptainer and for Docker both run it, as
# root, so that the two cannot drift: install.sh FOLDER, which holds constraints.txt and requirements, all other .txt files.
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
# Triton and torch.compile build their kernels at first use: that takes a compiler and Python's headers.
apt-get install --quiet --yes --no-install-recommends \
    bash ca-certificates g++ python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install.sh: the base image has $(python3 --version), and Moult needs 3.11 or newer: choose another BASE_IMAGE" >&2
    exit 1
}
python3 -m venv /opt/moult
# torch's wheel brings CUDA's libraries.
requirements=$(find "$1" -name '*.txt' ! -name constraints.txt -printf ' --requirement %p')
# shellcheck disable=SC2086 # several words
/opt/moult/bin/python -m pip install --no-cache-dir --constraint "$1/constraints.txt" $requirements
/opt/moult/bin/python -m pip check
