#!/bin/sh
# Serve an export without sinks (w_sink: 0) by `transformers serve`, for `backend: openai`:
#
#     launch/serve-transformers.sh runs/mine/export [PORT] [further options of `transformers serve`]
#
# Needs `pip install "transformers[serving]"`. It answers one request after the other: for a try, not for long evaluations.
# Not with --continuous-batching: there the sampling settings of the first request hold for all that follow.
# Exports with sinks bring their own code, which `transformers serve` does not load (it looks for the class in transformers alone):
# evaluate them with the built-in engine.
set -eu
model=$1
port=${2:-8000}
[ $# -lt 2 ] || shift
shift
exec transformers serve "$model" --host localhost --port "$port" "$@"
