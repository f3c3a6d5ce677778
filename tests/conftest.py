import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.installed_packages import remember_packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Small tensors on few cores: threads would cost more than they bring, and tests run beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# wandb.init reads what is installed and prepares to report its own errors, in half a second.
os.environ.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU

gc.set_threshold(20_000, 20, 100)  # a fiftieth of the time went into looking for garbage

TESTS = Path(__file__).parent
SHARED_DATA = Path(os.environ.get("LT_TRAIN_SHARED_DATA", TESTS / "../../shared/data")).resolve()


FAST = (
    "benchmarks/",
    "dataset/",
    "evaluation/grading/",
    "evaluation/test_sample_records.py",
    "evaluation/test_score_statistics.py",
    "evaluation/test_scores.py",
    "hybrid/test_blocked.py",
    "hybrid/test_documents.py",
    "hybrid/test_kv_size.py",
    "pipeline/test_rejection_sampling.py",
    "pipeline/test_run_folder.py",
    "recipe/",
    "runtime/",
    "test_layout.py",
    "test_readme.py",
)
"""The fast tier, `pytest -m fast`: files whose tests build no model and train nothing; a test that is marked slow is not in it."""

SLOWER = ("runtime/test_drawing.py", "runtime/test_huge_pages.py", "runtime/test_tracking.py", "runtime/test_other_trackers.py")
"""Files of those folders that are not in it: they import matplotlib, the engine, or what writes to a tracker."""


LONGEST = (
    "test_whole_path.py",
    "test_in_vllm.py",
    "test_comparison.py",
    "test_pipeline.py",
    "test_export_in_bare_process.py",
    "test_doctor.py",
    "test_launched_trainings.py",
    "test_notebook.py",
    "test_transformers_serve.py",
    "test_clients.py",
    "test_evaluation_run.py",
    "test_sequence_parallel.py",
    "test_grader_process.py",
    "test_probing.py",
    "test_check.py",
    "test_measured_memory.py",
    "test_stopped_commands.py",
    "test_training_processes.py",
    "test_two_processes.py",
    "test_distilled_reasoner.py",
    "test_chat.py",
)
"""Files that take minutes or share two processes' work, in the order in which they are begun."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts its processes
def pytest_sessionstart(session: pytest.Session) -> None:
    """Processes that pytest-xdist starts share what forks the tests' processes; for the whole of the tests it starts at once."""
    config = session.config
    if not hasattr(config, "workerinput"):
        from tests.support.processes import offer_servers

        chosen = config.args_source == config.ArgsSource.ARGS or config.option.markexpr or config.option.keyword
        offer_servers(at_once=not chosen and not config.option.collectonly)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark files and traces that are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}: set LT_TRAIN_SHARED_DATA to the folder that holds aime24.jsonl")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """Small inputs that failed once, and are not part of the project."""
    cases = Path(os.environ.get("LT_TRAIN_SHARED_CASES", SHARED_DATA.parent / "cases")).resolve()
    if not cases.is_dir():
        pytest.skip(f"no cases at {cases}: set LT_TRAIN_SHARED_CASES to the folder that holds rows/")
    return cases


@pytest.fixture(scope="session")
def qwen3_tokenizer(pytestconfig: pytest.Config) -> "PreTrainedTokenizerBase":
    """The real one, fetched once by a script that is not part of the project."""
    script = Path(os.environ.get("LT_TRAIN_SHARED_TOOLS", SHARED_DATA.parent / "tools")) / "get_qwen3_tokenizer.sh"
    folder = pytestconfig.cache.mkdir("qwen3-tokenizer")
    there = (folder / "tokenizer.json").exists()
    if not there and (
        not script.is_file() or subprocess.run(["bash", script, folder], capture_output=True, timeout=120).returncode
    ):
        pytest.skip(f"no Qwen3 tokenizer: {script} is missing, or cannot fetch it")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test that uses torch starts from one seed; the others do not wait for its import."""
    if torch := sys.modules.get("torch"):
        # torch.manual_seed remembers the stack for each accelerator that is not there yet, in a millisecond
        (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True, scope="module")
def frozen_libraries() -> None:
    """What is there when a file begins is no garbage: a training collects twice, and would look through all that libraries hold."""
    gc.freeze()
    remember_packages()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton's bindings report at the end what is still there


@pytest.fixture
def lt_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command as the shell would; returns exit code, stdout, stderr."""

    from lt_train import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lt-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def is_fast(path: Path) -> bool:
    name = path.relative_to(TESTS).as_posix()
    return name.startswith(FAST) and name not in SLOWER


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m fast` imports the fast files alone: what the others import takes longer than the fast tests do."""
    if config.option.markexpr != "fast":
        return None
    if collection_path.is_dir():
        folder = f"{collection_path.relative_to(TESTS).as_posix()}/"
        return None if folder.startswith(("./", *FAST)) or any(name.startswith(folder) for name in FAST) else True
    return None if is_fast(collection_path) else True


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_fast(item.path) and not item.get_closest_marker("slow"):
            item.add_marker("fast")
    # The longest files first: two processes then end at about the same time.
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
