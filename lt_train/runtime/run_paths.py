"""Where everything lies in the folder of a run: the one place that knows these names."""

from dataclasses import dataclass
from pathlib import Path

FINAL = "final"
"""The folder of the trained weights, in the folder of a training."""

MANIFEST = "manifest.json"
"""The step, settings and files of weights that training has written; its presence says that they are all there."""

MEASURED = "measured.json"
"""The metric by which weights are the best of their training, beside those weights."""

TRAINING_LOG = "log.jsonl"
"""A row for each logged step, in the folder of a training."""

SCORES = "scores.json"
"""The scores, in the folder of one evaluation of one variant."""

SAMPLES_META = "meta.json"
"""The fingerprint of the samples in the folder of one evaluation of one variant."""

LAYER_PROFILE = "profile.json"
"""The finished layer profile, in the folder of the profile."""


@dataclass(frozen=True)
class RunPaths:
    """The files of one run.

    Args:
        root: runs/<name>/.
    """

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every default written out."""
        return self.root / "recipe.yaml"

    @property
    def inputs(self) -> Path:
        """Fingerprints of the base and of the data."""
        return self.root / "inputs.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def stage(self, name: str) -> Path:
        """The folder in which a stage leaves what it makes."""
        return self.root / name

    def marker(self, stage: str) -> Path:
        """Written when a stage is done: its key, its files, its seconds."""
        return self.root / "stages" / f"{stage}.json"

    @property
    def data(self) -> Path:
        """The tokenized examples: made again from the data where they are missing or of other settings."""
        return self.root / "data"

    @property
    def profile(self) -> Path:
        return self.stage("profile")

    @property
    def layer_profile(self) -> Path:
        return self.profile / LAYER_PROFILE

    @property
    def profile_picture(self) -> Path:
        return self.profile / "profile.png"

    @property
    def hybrid(self) -> Path:
        return self.stage("hybrid")

    @property
    def hybrid_config(self) -> Path:
        return self.hybrid / "config.json"

    @property
    def layers(self) -> Path:
        """The layers that stream, by variant."""
        return self.hybrid / "layers.json"

    @property
    def teacher(self) -> Path:
        return self.stage("teacher")

    @property
    def train(self) -> Path:
        return self.stage("train")

    @property
    def training_log(self) -> Path:
        return self.train / TRAINING_LOG

    @property
    def trained(self) -> Path:
        """The trained weights, or the trained adapter."""
        return self.train / FINAL

    @property
    def trained_manifest(self) -> Path:
        return self.trained / MANIFEST

    def evaluation(self, variant: str, name: str) -> Path:
        """The folder of one evaluation of one variant."""
        return self.stage("eval") / variant / name

    def scores(self, variant: str, name: str) -> Path:
        return self.evaluation(variant, name) / SCORES

    def sample(self, variant: str, name: str) -> Path:
        return self.stage("sample") / variant / name

    @property
    def export(self) -> Path:
        return self.stage("export")
