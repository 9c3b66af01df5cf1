"""The images of a report: what is taken for what, what was answered wrong, what training sees. All within the page."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from matplotlib.image import imsave

from distconv.data.dataset import Images
from distconv.run.answers import short_names
from distconv.run.report.samples import Samples

MOST_CLASSES = 20  # whose matrix has room on a page
SHORT = 3  # letters that have room over a column


def confusion(samples: Samples) -> str:
    """A matrix of counts, or of many classes the most frequent confusions."""
    answers, names = samples.answers, _names(samples)
    total = len(answers.labels)
    right = f"{answers.correct:,} of {total:,} test images right; expected calibration error "
    right += f"{answers.calibration_error():.2%}"
    if answers.classes > MOST_CLASSES:
        found = "".join(
            f"<tr><td>{names[label]}</td><td>{names[inference]}</td><td>{count:,}</td></tr>"
            for label, inference, count in answers.confusions()
        )
        head = "<tr><th>label</th><th>inference</th><th>times</th></tr>"
        rows = f"<table><thead>{head}</thead><tbody>{found}</tbody></table>"
    else:
        matrix = answers.confusion()
        head = "".join(f"<th><span>{name}</span></th>" for name in names)
        named = " named" * any(len(name) > SHORT for name in names)
        rows = f'<table class="confusion{named}"><thead><tr><th>label</th>{head}</tr></thead>'
        most = np.log1p(max(1, matrix.max()))
        for name, counts in zip(names, matrix.tolist(), strict=True):
            cells = "".join(
                f'<td style="background:rgb(var(--shade), {0.65 * np.log1p(n) / most:.2f})">{n or ""}</td>'
                for n in counts
            )
            rows += f'<tr><th title="{name}">{name}</th>{cells}</tr>'
        rows += "</table>"
    return (
        f"<h2>What is taken for what</h2><div class='card'><p class='soft'>{right}. A row is a label, a column an "
        f"inference.</p>{rows}</div>"
    )


def wrong_images(samples: Samples) -> str:
    """Those first whose wrong answer was the surest; nothing where none was wrong."""
    answers, names = samples.answers, _names(samples)
    cards = "".join(
        f"<figure>{_image(image)}{names[answers.labels[i]]} → {names[answers.inferences[i]]}<br>"
        f"{answers.confidences[i]:.1%}, no. {i:,}</figure>"
        for i, image in zip(samples.hardest.tolist(), samples.hardest_images, strict=True)
    )
    return (
        f'<h2>The hardest test images</h2><div class="card"><p class="soft">label → inference, how sure it was, number '
        f'in the test set.</p><div class="images">{cards}</div></div>'
        if cards
        else ""
    )


def variants(samples: Samples, augmentation: str) -> str:
    """Training images as they are and as training changes them; nothing where it does not."""
    count = len(samples.augmented)
    if not count:
        return ""
    columns = samples.augmented.shape[1]
    rows = "".join(
        f'<div class="strip" style="grid-template-columns:repeat({columns}, minmax(0, 72px))">'
        f"{''.join(map(_image, row))}</div>"
        for row in samples.augmented
    )
    return (
        f'<h2>What training sees</h2><div class="card"><p class="soft">On the left images as they are, then changed by '
        f"--augment {html.escape(augmentation)}.</p>{rows}</div>"
    )


def _image(image: Images) -> str:
    """An image (H, W, 1 or 3) of bytes within the page."""
    pixels = np.repeat(255 - image, 3, axis=2) if image.shape[2] == 1 else image  # ink on paper
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(pixels), format="png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _names(samples: Samples) -> list[str]:
    """Of the classes, safe within a page."""
    names = short_names(samples.class_names or None) or [str(n) for n in range(samples.answers.classes)]
    return [html.escape(name) for name in names]
