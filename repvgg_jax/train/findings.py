"""What an evaluation leaves behind: `evaluation.json` and pictures beside it."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.transforms import EvalTransform
from repvgg_jax.files import replacing, write_text
from repvgg_jax.text import one_line, versions
from repvgg_jax.train.by_class import ByClass

if TYPE_CHECKING:
    from repvgg_jax.train.evaluate import Evaluation

NAME = "evaluation"
"""Files are called `evaluation.json`, `evaluation_confusion.png` and `evaluation_worst.png`."""

LISTED = 100
"""Images of the largest loss in `evaluation.json`."""

_SHOWN, _COLUMNS = 24, 6
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def write(evaluation: "Evaluation", directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes the metrics of both forms, and where the fused one is wrong.

    `evaluation.json` holds the metrics, the classes, every pair of classes that is confused, and
    the images of the largest loss; `evaluation_confusion.png` is the confusion matrix, unless there
    are too many classes; `evaluation_worst.png` shows the images of the largest loss.

    Args:
      evaluation: with numbers of single images.
      directory: created if it is missing; files of an earlier evaluation there are replaced.

    Returns:
      The files.

    Raises:
      OSError: they cannot be written.
    """
    directory = pathlib.Path(directory)
    by_class = ByClass.of(evaluation.classes, evaluation.fused)
    worst = worst_images(evaluation.images)
    rows = [_describe(evaluation, number) for number in worst[:LISTED]]
    content = {
        "source": evaluation.source,
        "data": evaluation.dataset.name,
        "images": int(evaluation.trained["images"]),
        "total": evaluation.total,
        "trained": evaluation.metrics(evaluation.trained),
        "fused": evaluation.metrics(evaluation.fused),
        "classes": [
            {
                "class": name,
                by_class.unit: int(by_class.images[label]),
                by_class.score_name: _number(by_class.score[label]),
            }
            for label, name in enumerate(by_class.names)
        ],
        "confused": [
            {"class": of, "taken_for": other, by_class.unit: count, "share": share}
            for of, other, count, share in by_class.pairs()
        ],
        "worst": rows,
        "versions": versions(*_PACKAGES),
    }
    written = [directory / f"{NAME}.json"]
    write_text(written[0], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if by_class.confusion is not None:
        written.append(directory / f"{NAME}_confusion.png")
        by_class.draw(written[-1])
    picture = directory / f"{NAME}_worst.png"
    if evaluation.draw_worst is not None:
        with replacing(picture) as temporary:
            evaluation.draw_worst(temporary)
        written.append(picture)
    elif not evaluation.dataset.masks and rows:
        _contact_sheet(evaluation.dataset, worst[:_SHOWN], rows, picture)
        written.append(picture)
    return written


def worst_images(images: Mapping[str, np.ndarray]) -> list[int]:
    """Indices of the counted images, sorted by decreasing loss; NaN comes first."""
    loss = np.where(images["mask"], np.nan_to_num(images["loss"], nan=np.inf), -np.inf)
    return np.argsort(-loss, kind="stable")[: int(images["mask"].sum())].tolist()


def _describe(evaluation: "Evaluation", number: int) -> dict[str, Any]:
    """What is said of an image."""
    images, classes = evaluation.images, evaluation.classes
    row: dict[str, Any] = {"number": number}
    if name := evaluation.dataset.evaluation[number].get("name"):
        row["name"] = str(name)
    row["loss"] = _number(images["loss"][number])
    for key, value in (("class", "label"), ("predicted", "predicted")):
        if value in images:
            row[key] = classes[int(images[value][number])]
    if "accuracy" in images:
        row["accuracy"] = _number(images["accuracy"][number])
    return row


def _contact_sheet(
    dataset: Dataset, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]], path: pathlib.Path
) -> None:
    """Draws images with their class, the predicted one, and the loss."""
    read = EvalTransform(dataset.evaluation, dataset.eval_crop, dataset.eval_shape)
    columns = min(_COLUMNS, len(numbers))
    lines = -(-len(numbers) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.5 * lines), dpi=110, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, number, row in zip(grid.flat, numbers, rows, strict=False):
        image = read(number)[0]["image"]
        gray = image.shape[-1] == 1
        axes.imshow(image[..., 0] if gray else image, cmap="gray", vmin=0, vmax=255)
        right = row["class"] == row["predicted"]
        loss = row["loss"]
        title = "\n".join(
            (
                one_line(row["class"], 22),
                "" if right else f"→ {one_line(row['predicted'], 20)}",
                "loss not finite" if loss is None else f"loss {loss:.2f}",
            )
        )
        axes.set_title(title, fontsize=8, color="#1f4e79" if right else "#b02020")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _number(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None
