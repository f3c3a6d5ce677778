"""Exports, loaded where lt_train cannot be imported. Each export starts a process for its own check."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lt_train.export.card import loading_code
from lt_train.export.checkpoint import CARD, export_hybrid
from lt_train.export.configs import exported_config
from lt_train.export.manifest import read_manifest
from lt_train.export.weights import in_memory
from lt_train.hybrid.families import HybridQwen3ForCausalLM
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import EXPORT_MANIFEST
from tests.support import processes
from tests.support.families import BASES, FAMILIES
from tests.support.launches import WARM_PYTHON, new_pythons_are_forked
from tests.support.tiny_exports import (
    END,
    TEMPLATE,
    exports_are_not_checked,
    metadata,
    tiny_hybrid,
    tiny_hybrid_with_learned_sinks,
    tiny_tokenizer,
)

pytestmark = pytest.mark.slow

IDS = torch.randint(2, 60, (1, 40), generator=torch.Generator().manual_seed(3))
PRELUDE = """
import sys
sys.modules["lt_train"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = load_file("ids.safetensors")["ids"]
def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
def logits(model):
    with torch.no_grad():
        return model(ids, use_cache=False).logits
"""


def export(model, out, **kwargs):
    settings = {"metadata": metadata(), "dtype": torch.float32} | kwargs
    return export_hybrid(in_memory(model), tiny_tokenizer(), out, settings.pop("metadata"), **settings)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def run_bare(script, scratch):
    """Run PRELUDE + `script` where lt_train cannot be imported; `scratch` is the working directory."""
    save_file({"ids": IDS}, scratch / "ids.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    return processes.run([sys.executable, "-P", "-c", PRELUDE + script], cwd=scratch, env=environment)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Qwen3 hybrid with sinks and its export, which a new interpreter checks, as users' exports."""
    torch.manual_seed(0)
    model = tiny_hybrid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt_train.export.verify.subprocess", subprocess)
        return model, export(model, tmp_path_factory.mktemp("exports") / "export")


def test_an_export_is_checked_in_a_new_interpreter(exported):
    _, folder = exported
    assert read_manifest(folder).check.logits_difference <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_with_sinks_gives_the_same_logits_and_tokens_in_a_bare_process(family, tmp_path):
    model = tiny_hybrid(family)
    folder = export(model, tmp_path / "export")
    check = read_manifest(folder).check
    assert check.logits_difference <= 1e-5 and check.ties == 0 and check.tokens > 0
    assert check.tolerance < min(check.faults.values()) and len(check.faults) == 3 + 2 * bool(model.spec.sliding_layers)
    assert check.model_class.startswith("Hybrid")
    assert json.loads((folder / "config.json").read_text())["model_type"].startswith("lt_hybrid_")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(("family", "w_sink"), [("qwen3", 3), ("llama", 0), ("phi3", 3)])
def test_an_export_of_split_layers_gives_the_same_logits_and_tokens_in_a_bare_process(family, w_sink, tmp_path):
    folder = export(tiny_hybrid(family, w_sink=w_sink, lazy=(1,), split=((0, (1,)), (2, (0,)))), tmp_path / "export")
    check, card = read_manifest(folder).check, (folder / "README.md").read_text()
    assert check.logits_difference <= 1e-5 and check.ties == 0 and check.tokens > 0
    assert check.faults["other KV heads"] > check.tolerance
    assert "trust_remote_code=True" in card and "- KV heads that stream in other layers (of 0 to 1): 0: 1; 2: 0" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["hybrid_version"] == "3" and config["streaming_kv_heads"] == [[1], [0, 1], [0], []]


@pytest.mark.parametrize(("family", "model_type"), [("qwen3", "qwen3"), ("llama", "ministral")])
def test_an_export_without_sinks_is_an_ordinary_checkpoint(family, model_type, tmp_path):
    model = tiny_hybrid(family, w_sink=0)
    folder = export(model, tmp_path / "export")
    assert not list(folder.glob("*.py"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__module__.startswith("transformers.models")
    largest = logits(model).abs().max()
    assert (logits(stock) - logits(model)).abs().max() <= 1e-5 * largest


def test_an_export_with_learned_sinks_is_an_ordinary_checkpoint_of_granite_swa(tmp_path):
    folder = export(tiny_hybrid_with_learned_sinks(BASES["qwen2"]), tmp_path / "export", dtype=torch.bfloat16)
    check, card = read_manifest(folder).check, (folder / "README.md").read_text()
    assert check.model_class == "GraniteSWAForCausalLM" and check.dtype == "bfloat16" and not list(folder.glob("*.py"))
    assert check.logits_difference <= check.tolerance < min(check.faults.values()) and check.tokens > 0
    assert "trust_remote_code" not in card and "`vllm serve FOLDER --max-num-batched-tokens 1024`" in card


@pytest.fixture(scope="module")
def dressed(tmp_path_factory):
    """An export in bf16, with tied weights, sampling defaults and a chat template of its own."""
    torch.manual_seed(0)
    model = tiny_hybrid()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=7, temperature=0.6, do_sample=True)
    out = tmp_path_factory.mktemp("exports") / "export"
    return export(model, out, dtype=torch.bfloat16, chat_template=TEMPLATE + "{{ 'A' }}")


def test_a_bf16_export_is_the_model_cast_to_bf16(dressed):
    check = read_manifest(dressed).check
    assert check.dtype == "bfloat16" and check.logits_difference <= check.tolerance
    assert {tensor.dtype for tensor in load_file(dressed / "model.safetensors").values()} == {torch.bfloat16}


def test_tied_weights_are_written_once(dressed):
    assert "lm_head.weight" not in load_file(dressed / "model.safetensors")


def test_tokenizer_template_and_ends_of_answers_come_with_it(dressed):
    tokenizer = AutoTokenizer.from_pretrained(dressed)
    assert tokenizer.padding_side == "left"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == f"b{END}A"
    generation = GenerationConfig.from_pretrained(dressed)
    assert generation.eos_token_id == [tokenizer.eos_token_id, 7] and generation.temperature == 0.6


def test_the_manifest_names_every_other_file(dressed):
    assert set(read_manifest(dressed).files) == {path.name for path in dressed.iterdir()} - {EXPORT_MANIFEST}


def test_a_tokenizer_that_would_come_back_as_another_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="loaded as Qwen2Tokenizer"):  # what AutoTokenizer makes of any tokenizer beside a qwen2
        export(tiny_hybrid("qwen2", w_sink=0), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export-refused"]


def test_the_code_of_the_model_card_runs_as_pasted_and_asks_nothing(exported, tmp_path):
    """In a Python that was started in the export, whose files then lie on its path."""
    _, folder = exported
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['lt_train'] = None\n{code}"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
    assert "[y/N]" not in run.stdout + run.stderr


def test_a_card_whose_code_asks_a_question_is_refused(tmp_path, monkeypatch):
    asks = loading_code(own_code=True).replace("AutoTokenizer.from_pretrained(folder, trust_remote_code=True)", "input('Run it?')")
    monkeypatch.setattr("lt_train.export.checkpoint.loading_code", lambda **_: asks)
    with pytest.raises(UserError, match=r"calls input\(\): Run it\?"):
        export(tiny_hybrid(), tmp_path / "export")


def test_files_have_the_mode_that_the_users_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with exports_are_not_checked():
            folder = export(tiny_hybrid(), tmp_path / "export")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir() if path.stat().st_mode & 0o777 != 0o640} == {}


def test_an_export_that_is_checked_ends_with_the_process_that_checks_it_and_leaves_nothing_in_the_temporary_folder(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = (
        "import tempfile; tempfile.tempdir = None\n"  # known before the fork
        f"import sys; sys.executable = {str(WARM_PYTHON)!r}\n"
        "from tests.export.test_export_in_bare_process import export\n"
        "from lt_train.export import checkpoint\n"
        "from pathlib import Path\n"
        "from tests.support.tiny_exports import tiny_hybrid\n"
        'slow = \'import os, time; print(os.getpid(), file=open("../process", "w"), flush=True); time.sleep(600)\'\n'
        "checkpoint.loading_code = lambda **_: slow\n"
        f"export(tiny_hybrid(), Path({str(tmp_path / 'export')!r}))\n"
    )
    places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    with new_pythons_are_forked() as environment:
        exporting = processes.start_python([sys.executable, "-c", program], tmp_path / "output", env=environment | places)
        try:
            checking = int(waited_for(tmp_path / "process"))
        finally:
            exporting.kill()
            processes.exit_code(exporting)
        deadline = time.monotonic() + 30
        while psutil.pid_exists(checking) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not psutil.pid_exists(checking)
    assert not list(temporary.iterdir())


def waited_for(path):
    """The text of a file that another process is about to write."""
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()


def test_a_loader_that_does_not_trust_the_code_gets_an_error_and_not_a_model_without_sinks(exported, tmp_path):
    _, folder = exported
    run = run_bare(f"load({str(folder)!r})", tmp_path)
    assert run.returncode != 0 and "trust_remote_code=True" in run.stderr


def test_where_lt_train_is_imported_its_own_class_loads_the_export(exported):
    model, folder = exported
    for trust in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **trust)
        assert type(loaded) is HybridQwen3ForCausalLM
        assert torch.equal(logits(loaded), logits(model))


def test_exports_by_different_versions_run_side_by_side(exported, tmp_path):
    """The second's code answers with the sinks off, as a stand-in for a version that computes something else."""
    model, first = exported
    second = tmp_path / "export"  # the same name: transformers must not take them for one
    shutil.copytree(first, second)
    for name, old, new in (
        ("spec.py", 'HYBRID_VERSION = "1"', 'HYBRID_VERSION = "2"'),
        ("config.json", '"hybrid_version": "1"', '"hybrid_version": "2"'),
        ("blocked.py", "    if q_BHTD.shape[2] == k_", "    w_sink = 0\n    if q_BHTD.shape[2] == k_"),
    ):
        text = (second / name).read_text()
        assert text.count(old) == 1
        (second / name).write_text(text.replace(old, new))
    run = run_bare(
        f"""
first = load({str(first)!r}, trust_remote_code=True)
alone = logits(first)
second = load({str(second)!r}, trust_remote_code=True)
assert type(first) is not type(second)
assert first.config._attn_implementation != second.config._attn_implementation
save_file(dict(first=logits(first), second=logits(second), alone=alone), "logits.safetensors")
""",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    found = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(found["first"], found["alone"])
    torch.testing.assert_close(found["first"], logits(model), atol=1e-5, rtol=0)
    without_sinks = tiny_hybrid(w_sink=0)
    without_sinks.load_state_dict(model.state_dict())
    torch.testing.assert_close(found["second"], logits(without_sinks), atol=1e-4, rtol=1e-5)
    assert (found["second"] - found["first"]).abs().max() > 1e-2


def test_a_loaded_export_can_be_saved_and_loaded_again(exported, tmp_path):
    model, folder = exported
    run = run_bare(
        f"""
load({str(folder)!r}, trust_remote_code=True).save_pretrained("again")
load("again", trust_remote_code=True).save_pretrained("once_more")
save_file(dict(logits=logits(load("once_more", trust_remote_code=True))), "logits.safetensors")
""",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], logits(model), atol=1e-5, rtol=0)


def test_an_export_gives_its_decoder_stack_alone(exported, tmp_path):
    model, folder = exported
    run = run_bare(
        f"""
from transformers import AutoModel
stack = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    save_file(dict(hidden=stack(ids, use_cache=False).last_hidden_state), "hidden.safetensors")
""",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    hidden = load_file(tmp_path / "hidden.safetensors")["hidden"]
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(hidden), logits(model), atol=1e-5, rtol=0)
        torch.testing.assert_close(AutoModel.from_pretrained(folder)(IDS).last_hidden_state, hidden, atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is chosen on a CPU")
def test_an_export_needs_no_flash_attention_and_chooses_its_attention_itself(exported, tmp_path):
    model, folder = exported
    run = run_bare(
        f"""
sys.modules["flash_attn"] = sys.modules["flash_attn_interface"] = None
model = load({str(folder)!r}, trust_remote_code=True)
assert model.model.attention_kernel == "auto"
kernels = sys.modules[type(model).__module__.rpartition(".")[0] + ".attention_kernels"]
choice = kernels.choose("auto", kernels.Use(torch.device("cpu"), torch.float32, head_size=16, trains=False))
assert choice.name == "blocked", choice
by_auto = logits(model)
model.set_attention_kernel("reference")
save_file(dict(auto=by_auto, reference=logits(model)), "logits.safetensors")
model.set_attention_kernel("flash")
try:
    logits(model)
except ValueError as error:
    assert "flash attention needs an NVIDIA GPU" in str(error), error
else:
    raise AssertionError("flash attention on a CPU")
""",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    for found in load_file(tmp_path / "logits.safetensors").values():
        torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=0)


def test_the_same_export_is_recognised_and_another_is_refused(exported):
    model, folder = exported
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said = []
    assert export(model, folder, report=said.append) == folder
    assert any("already" in line for line in said) and not any("writing" in line for line in said)
    with pytest.raises(UserError, match="another export"):
        export(model, folder, metadata=metadata(recipe="other"))
    with pytest.raises(UserError, match="another export"):
        export(tiny_hybrid(w_recent=9), folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_model_changed_in_memory_alone_is_not_exported(tmp_path):
    model = tiny_hybrid()
    model.model.layers[1].self_attn.scaling *= 1.5
    with pytest.raises(UserError, match="other logits") as refused:
        export(model, tmp_path / "export")
    kept = tmp_path / "export-refused"
    assert str(kept) in str(refused.value) and [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert (kept / "model.safetensors").is_file() and not (kept / EXPORT_MANIFEST).exists()


@pytest.mark.parametrize(("dtype", "name", "value"), [(torch.bfloat16, "sliding_window", 8), (torch.float32, "w_sink", 2)])
def test_an_export_whose_window_or_sinks_are_off_by_one_is_refused(dtype, name, value, tmp_path, monkeypatch):
    def wrong(model, dtype):
        config = exported_config(model, dtype)
        setattr(config, name, value)
        return config

    monkeypatch.setattr("lt_train.export.checkpoint.exported_config", wrong)
    with pytest.raises(UserError, match="other logits"):
        export(tiny_hybrid(w_recent=7), tmp_path / "export", dtype=dtype)
