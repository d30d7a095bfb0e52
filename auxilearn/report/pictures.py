"""Thumbnails and contact sheets of training images, as HTML."""

import base64
import io
import math
from html import escape

import numpy as np
from PIL import Image

from auxilearn.errors import UserError
from auxilearn.report.wording import readable

HEIGHT = 96  # pixels of a thumbnail, at most
SHOWN = 12  # images at each end of a contact sheet
BUDGET = 1000  # thumbnails in a page, about 2.5 KB each


class Thumbnails:
    """JPEG thumbnails of training images by place in the training set, each made once.

    ``missing`` counts the images that could not be read.
    """

    def __init__(self, evaluation):
        self.evaluation = evaluation
        self.encoded = {}  # {place: base64}
        self.missing = 0

    def add(self, places):
        """Make what is new among ``places``."""
        for place in map(int, places):
            if place in self.encoded:
                continue
            try:
                image = self.evaluation.images.load(self.evaluation.samples.positions[place])
            except UserError:
                self.encoded[place] = None
                self.missing += 1
                continue
            self.encoded[place] = _jpeg(image)

    def for_page(self):
        """{place: base64}, of those that could be made."""
        return {place: code for place, code in self.encoded.items() if code is not None}

    def image(self, place, *, inline):
        """An <img>, its data in place or left to the page's script."""
        code = self.encoded.get(place)
        if code is None:
            return '<span class="blank"></span>'
        if inline:
            return f'<img alt="" src="data:image/jpeg;base64,{code}">'
        return f'<img alt="" data-thumb="{place}">'


def _jpeg(image):
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((2 * HEIGHT, HEIGHT))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=74)
    return base64.b64encode(data.getvalue()).decode()


def extremes(weights, count=SHOWN):
    """Places of the ``count`` highest and of the ``count`` lowest of ``weights`` (n,), the most
    extreme first; NaN is left out, and no place is in both."""
    places = np.flatnonzero(~np.isnan(weights))
    order = places[np.argsort(-weights[places], kind="stable")]
    count = min(count, len(order) // 2)
    return order[:count], order[len(order) - count :][::-1]


def contact_sheets(findings, thumbnails, wanted=()):
    """{task number: HTML} of contact sheets: the target, the tasks ``wanted`` (numbers), then those
    of the highest and lowest mean weight in turn, until the page's thumbnails are used up."""
    tasks = findings.tasks
    order = tasks.order.tolist()
    turns = [k for pair in zip(order, reversed(order), strict=True) for k in pair]
    sheets = {}
    for k in dict.fromkeys([0, *wanted, *turns]):
        high, low = extremes(findings.evaluation.table.weights[:, k])
        new = {int(p) for p in (*high, *low)} - thumbnails.encoded.keys()
        if len(thumbnails.encoded) + len(new) > BUDGET and k != 0 and k not in wanted:
            continue
        thumbnails.add((*high, *low))
        sheets[k] = _sheet(findings, thumbnails, k, high, low)
    return {k: sheets[k] for k in [0, *order] if k in sheets}


def _sheet(findings, thumbnails, k, high, low):
    parts = []
    for title, places in (("Highest weight", high), ("Lowest weight", low)):
        cards = "".join(_card(findings, thumbnails, k, int(p)) for p in places)
        parts.append(f'<h3>{title}</h3><ul class="sheet large">{cards}</ul>')
    return "".join(parts)


def _card(findings, thumbnails, k, place):
    evaluation = findings.evaluation
    weight = evaluation.table.weights[place, k]
    number = f'<span class="number">weight {weight:.3g}</span>'
    image = thumbnails.image(place, inline=k == 0)
    if k == 0:
        text, wrong = target_text(findings, place)
        return f"<li{wrong}>{image}<p>{text}<br>{number}</p></li>"
    label = int(evaluation.samples.attributes[place, k - 1])
    words = ("no", "yes")
    text = f"label {words[label]}"
    scale = findings.run.config.aux_weight
    if scale > 0:  # of two classes, the one whose cross entropy is under log 2 is predicted
        right = evaluation.table.losses[place, k] / scale < math.log(2)
        text += f", predicted {words[label if right else 1 - label]}"
    return f"<li>{image}<p>{text}<br>{number}</p></li>"


def target_text(findings, place):
    """What a card says of the sample's labels, and a class attribute where the label is wrong."""
    evaluation = findings.evaluation
    names = evaluation.split.class_names
    given, true = evaluation.given_labels[place], evaluation.true_labels[place]
    prediction = evaluation.table.prediction[place]
    text = f"<b>{class_name(names[given])}</b><br>predicted: {class_name(names[prediction])}"
    if findings.target.wrong is None:
        return text, ""
    if given == true:
        return f'{text}<br><span class="tag fine">✓ right</span>', ""
    name = class_name(names[true])
    return f'{text}<br><span class="tag bad">✗ is: {name}</span>', ' class="wrong"'


def class_name(name):
    """A class's name for people: Black footed Albatross of 001.Black_footed_Albatross."""
    number, dot, rest = name.partition(".")
    return escape(readable(rest if dot and number.isdigit() else name))


def suspect_cards(findings, thumbnails, by, count=SHOWN):
    """HTML of a strip of the most suspicious samples by ``by``."""
    target = findings.target
    chosen = target.order(by)[:count]
    thumbnails.add(target.place[chosen])
    cards = []
    for i in chosen.tolist():
        place = int(target.place[i])
        text, wrong = target_text(findings, place)
        number = f"loss {target.loss[i]:.2f}"
        if target.weight is not None:
            number = f"weight {target.weight[i]:.3g}, {number}"
        number = f'<span class="number">{number}</span>'
        image = thumbnails.image(place, inline=True)
        cards.append(f"<li{wrong}>{image}<p>{text}<br>{number}</p></li>")
    return f'<ul class="sheet">{"".join(cards)}</ul>'
