"""Plain text from a .txt file, or from all .txt files of a folder."""

from pathlib import Path

from lt_train.runtime.errors import UserError, shortened


def read_texts(place: str, setting: str) -> dict[Path, str]:
    """The text of each file that is not blank, in the order of the files' names.

    Args:
        place: a .txt file or a folder of them. setting: names it in an error.

    Raises:
        UserError: no such file or folder, no .txt file in it, none with text, or one that is not UTF-8.
    """
    try:
        files = text_files(place)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    texts = {file: _read(file) for file in files}
    found = {file: text for file, text in texts.items() if text.strip()}
    if not found:
        raise UserError(f"{setting}: {place}: its {len(files)} .txt files are empty. Fix: name a folder of texts")
    return found


def text_files(place: str) -> list[Path]:
    """
    Raises:
        UserError: no such file or folder, or no .txt file in it.
    """
    path = Path(place).expanduser()
    if path.is_file() and path.suffix == ".txt":
        return [path]
    files = sorted(file for file in path.glob("*.txt") if file.is_file())
    if not files:
        where = shortened(str(path.absolute()), 300)
        raise UserError(f"{shortened(place)}: there is no .txt file in {where}. Fix: name a folder of .txt files")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from error
