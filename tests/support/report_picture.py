"""The picture of a run's report in the docs, as a laptop shows it.

python -m tests.support.report_picture runs/quickstart docs/report.png
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from lt_train.report import write_report
from tests.support.headless import headless_tab

WIDTH, HEIGHT, COLOURS = 1280, 1100, 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, headless_tab(Path(folder) / "profile") as tab:
        tab.look(WIDTH, HEIGHT)
        tab.open(write_report([given.run], Path(folder) / "report.html"))
        shot = Image.open(tab.screenshot(Path(folder) / "page.png")).convert("RGB")
        shot.quantize(COLOURS).save(given.picture, optimize=True)


if __name__ == "__main__":
    main()
