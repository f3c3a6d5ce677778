"""An export goes to the Hugging Face hub, into a repository that is private unless its owner made it public."""

import os
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants

from lt_train.export.manifest import verify_files
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import EXPORT_MANIFEST

TOKEN = "HF_TOKEN"


def check_push(repo: str) -> None:
    """
    Raises:
        UserError: the environment has no token, or keeps the hub's client offline.
    """
    if not os.environ.get(TOKEN):
        raise UserError(f"export.push: {repo}: {TOKEN} is not set in the environment. Fix: set it to a token that may write there")
    if constants.is_offline_mode():
        raise UserError(f"export.push: {repo}: HF_HUB_OFFLINE is set. Fix: unset it, or remove export.push")


def push_export(folder: Path, repo: str, report: Callable[[str], None]) -> None:
    """Upload the export in `folder`, and remove from the repository what an earlier one left there.

    What was uploaded before, in a push that was interrupted too, is not uploaded again.

    Raises:
        UserError: the export was changed, the repository holds something else, or the hub refuses or cannot be reached.
    """
    check_push(repo)
    manifest = verify_files(folder)
    api = HfApi(token=os.environ[TOKEN])
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        found = set(api.list_repo_files(repo)) - {".gitattributes"}
        others = sorted(found - {EXPORT_MANIFEST, *manifest.files})
        if others and EXPORT_MANIFEST not in found:
            raise UserError(
                f"export.push: {repo}: this repository holds no export, but files such as {others[0]}; nothing was pushed. "
                "Fix: name another repository, or empty this one"
            )
        if not api.repo_info(repo).private:
            report(f"warning: {repo} is a public repository")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export by lt-train", delete_patterns="*")
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"export.push: {repo}: {_reason(error)}. The export in {folder} is complete. "
            f"Fix: see that {api.endpoint} can be reached and that {TOKEN} may write there; the same command pushes what is missing"
        ) from error
    report(f"pushed to {api.endpoint}/{repo}")


def _reason(error: BaseException) -> str:
    """The first line of an error, and of that from which it arose."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    cause = f" ({_reason(error.__cause__)})" if error.__cause__ else ""
    return (lines[0] if lines else type(error).__name__) + cause
