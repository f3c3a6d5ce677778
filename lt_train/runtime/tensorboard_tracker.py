"""The curves, pictures and scores of a run in TensorBoard's event files. `tensorboard --logdir runs` shows them.

Each resume writes a file of its own: it reads from the former ones which points are there, and writes those that are missing. So no
point is there twice, and no step needs purging, which would take the points of other curves with it.
"""

import json
from pathlib import Path
from typing import Any

from lt_train.runtime.markdown import markdown_table

FLUSH_SECONDS = 10
FOLDER = "tensorboard"  # in the run folder
_TEXT = "/text_summary"
"""What TensorBoard adds to the name of a text."""


class TensorBoardTracker:
    def __init__(self, run_folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_folder / FOLDER
        self._points: set[tuple[str, int]] = set()
        self._texts: dict[str, tuple[int, str]] = {}  # the last of each name, and its step
        for file in sorted(folder.glob("events.out.tfevents.*")):
            self._read(file)
        self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
        self._text("recipe", "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines()))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if (name, step) not in self._points and isinstance(value, int | float):
                self._points.add((name, step))
                self._writer.add_scalar(name, value, step)

    def log_behind(self, group: str, metrics: dict[str, float], step: int) -> None:
        self.log({f"{group}/{name}": value for name, value in metrics.items()}, step)  # here every curve has an axis of its own

    def image(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        if (name, 0) not in self._points:
            self._points.add((name, 0))
            with Image.open(path) as picture:
                self._writer.add_image(name, np.asarray(picture.convert("RGB")), 0, dataformats="HWC")

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._text(name, markdown_table(columns, rows))

    def summary(self, values: dict[str, Any]) -> None:
        self.table("summary", ["name", "value"], [[name, value] for name, value in values.items()])

    def finish(self) -> bool:
        self._writer.close()
        return True

    def _text(self, name: str, text: str) -> None:
        """A later text has a later step: TensorBoard shows the last one first."""
        step, last = self._texts.get(name, (-1, None))
        if text != last:
            self._texts[name] = step + 1, text
            self._writer.add_text(name, text, step + 1)

    def _read(self, file: Path) -> None:
        """The content of a file; a truncated record ends it."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                name, is_text = value.tag.removesuffix(_TEXT), value.metadata.plugin_data.plugin_name == "text"
                if not is_text:
                    self._points.add((name, event.step))
                elif event.step > self._texts.get(name, (-1, ""))[0]:
                    self._texts[name] = event.step, value.tensor.string_val[0].decode()
