"""Files and folders of a run: the one place that knows their names."""

from pathlib import Path

FINAL = "final"
"""The folder of the trained weights, in the folder of a training."""

MANIFEST = "manifest.json"
"""The step, settings and files of weights that training has written; it is written last, so with it all of them are there."""

EXPORT_MANIFEST = "lt_train_export.json"
"""The files of an export and how it was checked; it is written last as well."""

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


class RunPaths:
    """The files of one run.

    Args:
        root: runs/<name>/.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"  # with every default written out
        self.inputs = root / "inputs.json"  # fingerprints of the base and of the data, and what `model.dtype: auto` means
        self.lock = root / ".lock"
        self.launch = root / ".launch.json"  # of the latest launch of several processes: the packages of its first one
        self.data = root / "data"  # the tokenized examples: made again where they are missing or of other settings
        self.profile = self.stage("profile")
        self.layer_profile = self.profile / LAYER_PROFILE
        self.profile_picture = self.profile / "profile.png"
        self.curve_picture = self.profile / "curve.png"  # KV cache against the rise that gates predicts
        self.hybrid = self.stage("hybrid")
        self.hybrid_config = self.hybrid / "config.json"
        self.layers = self.hybrid / "layers.json"  # the layers that stream, by variant
        self.teacher = self.stage("teacher")
        self.train = self.stage("train")
        self.training_log = self.train / TRAINING_LOG
        self.trained = self.train / FINAL  # the trained weights, or the trained adapter
        self.trained_manifest = self.trained / MANIFEST
        self.export = self.stage("export")

    def stage(self, name: str) -> Path:
        """The folder in which a stage leaves what it makes."""
        return self.root / name

    def marker(self, stage: str) -> Path:
        """Written when a stage is done: its key, its files, its seconds."""
        return self.root / "stages" / f"{stage}.json"

    def sinks(self, variant: str) -> Path:
        """The learned sinks of an untrained hybrid."""
        return self.hybrid / f"sinks-{variant}.safetensors"

    def evaluation(self, variant: str, name: str) -> Path:
        """The folder of one evaluation of one variant."""
        return self.stage("eval") / variant / name

    def scores(self, variant: str, name: str) -> Path:
        return self.evaluation(variant, name) / SCORES

    def sample(self, variant: str, name: str) -> Path:
        return self.stage("sample") / variant / name
