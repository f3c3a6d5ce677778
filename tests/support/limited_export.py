"""An export in a process whose memory has a limit, and what it took."""

import ctypes
import json
import resource
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from lt_train.export.checkpoint import export_hybrid
from lt_train.export.weights import ExportedHybrid, MergedWeights, WeightFiles, base_files, files_by_name
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from tests.support.peak_memory import anonymous_peak_of, resident
from tests.support.tiny_exports import metadata, tiny_tokenizer

M_MMAP_THRESHOLD = -3


def export_within(allowed: int, base: Path, adapter: Path, out: Path, spec: HybridSpec, shard: int) -> None:
    """Export in fp32 with at most `allowed` bytes of data beside what the libraries hold, and write down what that took."""
    torch.set_num_threads(1)
    # What is freed goes back to the kernel at once: the C library would keep some of it, by chance more than a shard.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 10**6)
    tokenizer, config = tiny_tokenizer(), AutoConfig.from_pretrained(base)
    limit = resident("VmData") + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def empty() -> HybridForCausalLM:
        with torch.device("meta"):
            return build_hybrid(config, spec)

    def refuse() -> HybridForCausalLM:
        raise AssertionError("the whole model is loaded")

    lines: list[str] = []

    def export() -> None:
        weights = WeightFiles(files_by_name(base_files(str(base), None)))
        weights.check_fits(empty())
        merged = MergedWeights(weights, empty(), adapter, None)
        hybrid = ExportedHybrid(empty(), merged.read, refuse, torch.float32)
        export_hybrid(hybrid, tokenizer, out, metadata(), dtype=torch.float32, max_shard_size=shard, report=lines.append)

    taken = anonymous_peak_of(export)
    measured = {"peak of anonymous memory": taken, "lines": lines}
    out.with_suffix(".json").write_text(json.dumps(measured))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    spec = HybridSpec(given["num_layers"], tuple(given["lazy_layers"]))
    export_within(given["allowed"], *(Path(given[name]) for name in ("base", "adapter", "out")), spec, given["shard"])
