"""`smalti evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from smalti.errors import ConfigError
from smalti.report.one_result import render_origins, render_result
from smalti.report.quality import as_text
from smalti.workflows.compare import compare
from smalti.workflows.evaluate import evaluate
from smalti.workflows.evaluate_sources import Drawing


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """FID, sFID, Inception Score, precision, recall and others, each with its uncertainty and how it was made.

    Runs are drawn from on the way, nothing is stored but the numbers. Start it under torchrun to share the work.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Run or model folders, folders of images, image sets (emoji32#validation), .npz files with arr_0."""
    reference: str = ""
    """Real images (set, folder, .npz), or statistics (.npz with mu and sigma). Left out: what the run trained on."""
    features: str = "inception"
    """Feature network: inception or inception:WEIGHTS, lite0, lite0@96 (small images), dinov2:FOLDER."""
    metrics: tuple[str, ...] = ()
    """Left out: fid sfid inception_score precision recall, or kid fd_pca64 precision recall where not inception."""
    drawing: Annotated[Drawing, tyro.conf.arg(name="")] = field(default_factory=Drawing)
    """How the images of a run are drawn."""
    training: str = ""
    """Images to look for copies of. Left out: what each run trained on; none: do not look."""
    intervals: bool = True
    """95 % intervals, by leaving out a tenth of the images ten times."""
    floor: bool = True
    """What real images would get in place of ours."""
    image_size: int | None = None
    """Scale and crop existing images to this side; changes the numbers. Runs draw at their own size."""
    convert: bool = False
    """Accept existing images that are not 8-bit RGB."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    save_statistics: Path | None = None
    """Also write mean and covariance of the features to this .npz, a --reference for later; without one, only that."""
    out: Path | None = None
    """Folder for results. Left out: `evaluation` in the run folder, or beside the images."""

    def run(self) -> None:
        results = evaluate(
            self.sources,
            reference=self.reference or None,
            features=self.features,
            metrics=[name.strip().lower() for word in self.metrics for name in word.split(",") if name.strip()],
            drawing=self.drawing,
            training=self.training.lower() if self.training.lower() == "none" else self.training or None,
            intervals=self.intervals,
            floor=self.floor,
            image_size=self.image_size,
            convert=self.convert,
            device=self.device,
            save_statistics=self.save_statistics,
            out=self.out,
        )
        if len(results) > 1:
            try:
                table = compare([path for path, _ in results]).table
            except ConfigError as refusal:  # numbers that share no column stand alone
                print(*(render_result(result) for _, result in results), f"smalti compare: {refusal}", sep="\n\n")
            else:
                print(render_origins([result for _, result in results]), as_text(table), sep="\n\n")
        elif results:
            print(render_result(results[0][1]))
