"""The embedded miniature: a small, drawn bird data set in the layout of CUB-200-2011.

    python data_preprocess.py --generate mini                       # 3,300 pictures, 72 px
    python -m auxilearn.data.miniature --sheet docs/miniature.png   # a look at the species

It stands in for CUB where the real 1.1 GB are not at hand: the same files, the same kind of task,
seconds to draw. Twenty invented species in five genera share thirteen traits, from bill shape to
leg colour. Species of a genus differ in two or three of them, and every value of every trait is
shared by several species, so that only a combination of parts names a bird. Any trait of any single
bird may be untypical of its species (``UNTYPICAL``): whoever saw all traits would name about 92 of
100 birds. Place, size, posture, light, the shade of the plumage, scenery and leaves in front vary
freely.

The binary attributes come in three roles, so that a scheduler of auxiliary tasks can be checked
against what is known about them:

informative   parts of the bird, true to the drawing, which mostly follows the species
irrelevant    drawn as truthfully, but independent of the species: scenery, season, light, posture
noise         coin flips without any relation to the picture or the species

A mirrored picture keeps all its attributes. The roles stand in ``attribute_roles.json`` beside
CUB's own files and nowhere else: the order of the attributes is scrambled and their names are of
CUB's kind. All is a function of the seed, picture by picture: picture n of a species is the same
however many are drawn.
"""

import argparse
import functools
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from auxilearn.errors import UserError, run_script
from auxilearn.files import new_folder

# ---------------------------------------------------------------- what there is to draw

_SPECIES_TABLE = """
name                          bill   bill_hue crest crown face    throat back  breast pattern wing tail   band legs
Hearth_Bramblefinch           cone   orange   -     -     -       -      brown rust   -       bars square -    dark
Ruby_capped_Bramblefinch      cone   orange   -     red   -       black  brown rust   -       bars square -    dark
Kindled_Bramblefinch          cone   orange   -     red   -       -      brown rust   streaks -    square -    dark
Sooty_throated_Bramblefinch   cone   orange   -     -     -       black  brown rust   streaks -    square -    dark
Plumed_Copsejay               dagger dark     crest -     eyeline -      blue  white  -       bars long   band dark
Porcelain_Copsejay            dagger dark     -     -     -       -      blue  white  -       bars long   band dark
Harvest_Copsejay              dagger dark     -     -     eyeline -      blue  rust   -       bars long   -    dark
Cavalier_Copsejay             dagger dark     crest -     -       -      blue  rust   -       bars long   -    dark
Spectacled_Tarnwarbler        dagger dark     -     black eyering -      olive yellow -       bars forked -    orange
Lemon_Tarnwarbler             dagger dark     -     -     -       -      olive yellow -       bars forked -    orange
Inkcap_Tarnwarbler            dagger dark     -     black -       -      olive yellow -       -    square -    orange
Moonring_Tarnwarbler          dagger dark     -     -     eyering -      olive yellow -       -    square -    orange
Bearded_Skerrythrush          dagger orange   -     -     eyering black  grey  white  spots   -    square band orange
Harbour_Skerrythrush          dagger dark     -     -     eyering black  grey  white  -       -    square band orange
Lantern_billed_Skerrythrush   dagger orange   -     -     eyering -      grey  white  -       -    square -    orange
Pebbled_Skerrythrush          dagger dark     -     -     eyering -      grey  white  spots   -    square -    orange
Gorse_Moorsickle              curved dark     -     -     eyeline -      brown yellow spots   -    forked -    dark
Drizzle_Moorsickle            curved dark     -     -     eyeline -      grey  white  spots   -    forked -    dark
Primrose_Moorsickle           curved dark     crest -     eyeline -      grey  yellow -       -    forked -    dark
Heath_Moorsickle              curved dark     crest -     eyeline -      brown white  -       -    forked -    dark
"""  # noqa: E501

_ROWS = [line.split() for line in _SPECIES_TABLE.strip().splitlines()]
SPECIES = {row[0]: dict(zip(_ROWS[0][1:], row[1:], strict=True)) for row in _ROWS[1:]}
TRAITS = {t: tuple(sorted({s[t] for s in SPECIES.values()})) for t in _ROWS[0][1:]}
UNTYPICAL = 0.1  # how often a trait of a single bird takes another value than its species'

SCENE = {  # value: how often
    "background": {"water": 0.25, "foliage": 0.25, "mountain": 0.25, "meadow": 0.25},
    "season": {"summer": 0.5, "autumn": 0.5},
    "light": {"day": 0.6, "evening": 0.4},
    "perch": {"branch": 0.5, "wire": 0.25, "stone": 0.25},
    "front": {"clear": 0.5, "leaves": 0.5},
    "posture": {"level": 0.55, "upright": 0.45},
}

_INFORMATIVE = {
    "has_bill_shape::cone": ("bill", "cone"),
    "has_bill_shape::curved_(up_or_down)": ("bill", "curved"),
    "has_bill_color::orange": ("bill_hue", "orange"),
    "has_head_pattern::crested": ("crest", "crest"),
    "has_crown_color::black": ("crown", "black"),
    "has_crown_color::red": ("crown", "red"),
    "has_head_pattern::eyeline": ("face", "eyeline"),
    "has_head_pattern::eyering": ("face", "eyering"),
    "has_throat_color::black": ("throat", "black"),
    "has_upperparts_color::blue": ("back", "blue"),
    "has_upperparts_color::brown": ("back", "brown"),
    "has_breast_color::yellow": ("breast", "yellow"),
    "has_breast_color::rufous": ("breast", "rust"),
    "has_breast_pattern::spotted": ("pattern", "spots"),
    "has_breast_pattern::striped": ("pattern", "streaks"),
    "has_wing_pattern::striped": ("wing", "bars"),
    "has_tail_shape::forked_tail": ("tail", "forked"),
    "has_tail_shape::pointed_tail": ("tail", "long"),
    "has_tail_pattern::striped": ("band", "band"),
    "has_leg_color::orange": ("legs", "orange"),
}
_IRRELEVANT = {
    "has_background_kind::water": ("background", "water"),
    "has_background_kind::foliage": ("background", "foliage"),
    "has_background_kind::mountain": ("background", "mountain"),
    "has_season_color::autumn": ("season", "autumn"),
    "has_light_color::evening": ("light", "evening"),
    "has_perch_kind::branch": ("perch", "branch"),
    "has_foreground_kind::leaves": ("front", "leaves"),
    "has_body_angle::upright": ("posture", "upright"),
}
_NOISE = {  # how often the coin shows 1
    "has_primary_call::trill": 0.35,
    "has_primary_call::whistle": 0.4,
    "has_egg_color::speckled": 0.5,
    "has_nest_shape::cup": 0.6,
    "has_under_tail_color::buff": 0.25,
    "has_underwing_color::white": 0.3,
    "has_flight_pattern::undulating": 0.45,
    "has_main_diet::insects": 0.55,
    "has_migration_range::long": 0.2,
    "has_flock_size::solitary": 0.5,
}
ROLES = {
    **dict.fromkeys(_INFORMATIVE, "informative"),
    **dict.fromkeys(_IRRELEVANT, "irrelevant"),
    **dict.fromkeys(_NOISE, "noise"),
}
ATTRIBUTES = sorted(ROLES, key=lambda name: zlib.crc32(name.encode()))  # scrambled, and for good

_DESCRIPTION = (
    "informative: a part of the bird, mostly follows the species; irrelevant: truly drawn but "
    "independent of the species; noise: a coin flip related to nothing. 'shows' says what an "
    "attribute is 1 for, 'species' the traits of a typical bird; each trait of each bird takes "
    "another value with probability 'untypical'."
)
_IMAGE, _SPLIT = 1, 2  # random streams: what a picture shows, which pictures are for training

# ---------------------------------------------------------------- what one picture shows


@dataclass(frozen=True)
class Picture:
    """All that decides a picture. ``bits`` are its attributes in the order of ``ATTRIBUTES``."""

    traits: dict  # the bird's own traits, mostly those of its species
    scene: dict
    place: tuple  # of the bird's middle, in picture widths
    scale: float  # of the bird, in picture widths
    nod: float  # of the head, in radians
    mirror: bool
    tint: tuple  # factors of red, green and blue, by the hour of the day
    grain: int  # seeds the details: hills, leaves, the shade of the plumage
    bits: tuple


def picture_of(species, number, *, seed=0):
    """The content of picture ``number`` (1, 2, ...) of a species (index into the table)."""
    rng = np.random.default_rng([seed, _IMAGE, species, number])
    traits = dict(list(SPECIES.values())[species])
    for trait, values in TRAITS.items():
        others = [value for value in values if value != traits[trait]]
        if rng.random() < UNTYPICAL:
            traits[trait] = others[rng.integers(len(others))]
    scene = {key: str(rng.choice(list(odds), p=list(odds.values()))) for key, odds in SCENE.items()}
    coins = {name: rng.random() < odds for name, odds in _NOISE.items()}
    shown = {name: traits[trait] == value for name, (trait, value) in _INFORMATIVE.items()}
    shown |= {name: scene[key] == value for name, (key, value) in _IRRELEVANT.items()} | coins
    return Picture(
        traits=traits,
        scene=scene,
        place=tuple(rng.uniform((0.42, 0.42), (0.58, 0.54)).tolist()),
        scale=rng.uniform(0.31, 0.46),
        nod=rng.uniform(-0.22, 0.22),
        mirror=bool(rng.random() < 0.5),
        tint=tuple((rng.uniform(0.78, 1.06) * rng.uniform(0.94, 1.06, size=3)).tolist()),
        grain=int(rng.integers(2**31)),
        bits=tuple(int(shown[name]) for name in ATTRIBUTES),
    )


# ---------------------------------------------------------------- paper and brush

_HUES = {
    "brown": (150, 100, 70),
    "blue": (72, 122, 176),
    "olive": (130, 145, 74),
    "grey": (126, 136, 148),
    "white": (244, 238, 226),
    "yellow": (246, 204, 80),
    "rust": (211, 111, 66),
    "black": (48, 45, 54),
    "red": (205, 54, 52),
    "orange": (243, 142, 48),
    "dark": (64, 58, 64),
}
_LEAVES = {  # from the sunny to the shady ones
    "summer": ((150, 186, 122), (116, 160, 106), (84, 130, 92)),
    "autumn": ((231, 193, 122), (205, 152, 92), (164, 104, 76)),
}
_SKIES = {  # above, below
    "day": ((160, 204, 226), (234, 242, 232)),
    "evening": ((206, 160, 186), (255, 214, 168)),
}
_CREAM, _INK = (250, 245, 234), (38, 34, 42)


def _mix(one, other, share):
    """``one`` with a share of ``other`` stirred in."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


@functools.cache
def _spline():
    """Catmull-Rom weights of four neighbouring points along a segment, (7, 4)."""
    u = np.linspace(0, 1, 7, endpoint=False)
    weights = (-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, u**3 - u**2)
    return np.stack(weights, axis=1) / 2


def _curve(points):
    """The closed smooth curve through ``points``, (n, 2) -> (7 n, 2)."""
    ring = np.concatenate([points[-1:], points, points[:2]])
    neighbours = np.stack([ring[k : k + len(points)] for k in range(4)])  # (4, n, 2)
    return np.einsum("sk,knd->nsd", _spline(), neighbours).reshape(-1, 2)


def _fan(above, below, size):
    """A vertical blend of two colours, an image."""
    rows = np.linspace(above, below, size).astype(np.uint8)[:, None]
    return Image.fromarray(np.repeat(rows, size, axis=1))


class _Brush:
    """Draws on an image in coordinates of its own.

    A point, as a row, times ``matrix`` plus ``origin`` is its place in picture widths.
    """

    def __init__(self, image, matrix=((1, 0), (0, 1)), origin=(0, 0)):
        self.image = image
        self.draw = ImageDraw.Draw(image, "RGBA" if image.mode == "RGB" else None)
        self.matrix = np.asarray(matrix) * image.width
        self.origin = np.asarray(origin) * image.width
        self.unit = math.hypot(*self.matrix[0])  # pixels

    def pixels(self, points):
        return list(map(tuple, (np.asarray(points) @ self.matrix + self.origin).tolist()))

    def shape(self, points, colour, smooth=True):
        self.draw.polygon(self.pixels(_curve(points) if smooth else points), fill=colour)

    def dot(self, centre, radius, colour):
        ((x, y),) = self.pixels([centre])
        r = radius * self.unit
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def stroke(self, points, width, colour):
        path, r = self.pixels(points), width / 2 * self.unit
        self.draw.line(path, fill=colour, width=max(1, round(2 * r)), joint="curve")
        for x, y in (path[0], path[-1]):
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


# ---------------------------------------------------------------- the scenery


def _hills(brush, rng, height, swing, colour):
    """A rolling ground from ``height`` (0 top, 1 bottom) down."""
    x = np.linspace(-0.05, 1.05, 24)
    phase, pace = rng.uniform(0, 7), rng.uniform(3, 6)
    y = height + swing * np.sin(pace * x + phase) + swing / 2 * np.sin(2.3 * pace * x + 2 * phase)
    outline = [*zip(x, y, strict=True), (1.05, 1.1), (-0.05, 1.1)]
    brush.shape(outline, colour, smooth=False)


def _water(brush, rng, sky, leaf):
    _hills(brush, rng, 0.5, 0.05, _mix(leaf[0], sky[1], 0.45))
    _hills(brush, rng, 0.57, 0.03, _mix(leaf[1], sky[1], 0.25))
    lake = _mix((104, 158, 182), sky[0], 0.35)
    shore = rng.uniform(0.6, 0.66)
    brush.shape([(0, shore), (1, shore), (1, 1), (0, 1)], lake, smooth=False)
    for _ in range(11):
        x, y = rng.uniform(0, 1), rng.uniform(shore + 0.03, 0.98)
        reach = rng.uniform(0.04, 0.14)
        shine = _mix(lake, (_CREAM, (40, 90, 120))[rng.integers(2)], rng.uniform(0.2, 0.45))
        brush.stroke([(x - reach, y), (x + reach, y)], 0.013, shine)


def _foliage(brush, rng, sky, leaf):
    shade = _mix(leaf[0], sky[0], 0.35), _mix(leaf[2], leaf[1], 0.5)
    brush.image.paste(_fan(*shade, brush.image.width))
    for _ in range(26):
        glow = _mix(leaf[rng.integers(3)], sky[rng.integers(2)], rng.uniform(0.0, 0.6))
        glow = (*glow, int(rng.integers(60, 150)))
        brush.dot(rng.uniform(0, 1, 2), rng.uniform(0.04, 0.15), glow)


def _mountain(brush, rng, sky, leaf):
    for back, rock in ((1, (150, 160, 184)), (0, (112, 124, 152))):
        rock = _mix(rock, sky[1], 0.2 + 0.25 * back)
        for x in rng.uniform(-0.1, 0.4) + np.array([0.0, 0.55]) + 0.25 * back:
            top, wide = rng.uniform(0.2, 0.36) - 0.06 * back, rng.uniform(0.38, 0.5)
            peak = np.array([(x - wide, 0.85), (x, top), (x + wide, 0.85)])
            brush.shape(peak, rock, smooth=False)
            left, right = (peak[1] + 0.26 * (foot - peak[1]) for foot in (peak[0], peak[2]))
            edge = [(x + wide * d, top + h) for d, h in ((0.05, 0.11), (0, 0.17), (-0.05, 0.1))]
            brush.shape([left, peak[1], right, *edge], _mix(_CREAM, rock, 0.12), smooth=False)
    _hills(brush, rng, 0.76, 0.02, _mix(leaf[1], sky[1], 0.15))
    for x in np.arange(-0.02, 1.05, 0.075) + rng.uniform(-0.02, 0.02, 15):
        tall = rng.uniform(0.1, 0.19)
        tree = [(x - 0.045, 0.82), (x, 0.82 - tall), (x + 0.045, 0.82)]
        brush.shape(tree, _mix(leaf[2], sky[1], 0.2), smooth=False)
    _hills(brush, rng, 0.82, 0.015, _mix(leaf[2], leaf[1], 0.3))


def _meadow(brush, rng, sky, leaf):
    brush.dot(rng.uniform((0.1, 0.1), (0.9, 0.3)), 0.09, _mix(sky[1], (255, 250, 225), 0.7))
    _hills(brush, rng, 0.55, 0.06, _mix(leaf[0], sky[1], 0.4))
    for x in rng.uniform(0, 1, 3):
        y, r = rng.uniform(0.55, 0.6), rng.uniform(0.05, 0.09)
        brush.stroke([(x, y), (x, y + 0.12)], 0.018, _mix((110, 84, 70), sky[1], 0.25))
        brush.dot((x, y), r, _mix(leaf[2], sky[1], 0.35))
    _hills(brush, rng, 0.7, 0.04, _mix(leaf[0], leaf[1], 0.4))
    _hills(brush, rng, 0.84, 0.03, leaf[1])
    for flower in rng.uniform((0, 0.75), (1, 1), (16, 2)):
        petals = (_CREAM, (248, 206, 110), (222, 120, 130))[rng.integers(3)]
        brush.dot(flower, rng.uniform(0.008, 0.016), petals)


_BACKGROUNDS = {"water": _water, "foliage": _foliage, "mountain": _mountain, "meadow": _meadow}


def _backdrop(scene, size, rng):
    """The sky and what lies under it; returns an image."""
    sky, leaf = _SKIES[scene["light"]], _LEAVES[scene["season"]]
    brush = _Brush(_fan(*sky, size))
    if scene["background"] != "foliage":
        for x, y in rng.uniform((0, 0.06), (1, 0.3), (2, 2)):
            for step in (-0.07, 0.0, 0.06):
                cloud = (x + step, y + abs(step) / 3)
                brush.dot(cloud, 0.055 - abs(step) / 4, _mix(sky[1], _CREAM, 0.55))
    _BACKGROUNDS[scene["background"]](brush, rng, sky, leaf)
    return brush.image


def _leaf(brush, stem, angle, length, colour):
    """A pointed leaf with its midrib, growing from ``stem``."""
    along = np.array([math.cos(angle), math.sin(angle)])
    across = along[::-1] * (-1, 1)
    brush.shape(stem + length * _PARTS["leaf"] @ np.stack([along, across]), colour)
    brush.stroke([stem, stem + 0.85 * length * along], 0.07 * length, _mix(colour, _CREAM, 0.3))


def _perch(brush, scene, foot, rng):
    """What the bird sits on, under its feet at ``foot``."""
    x, y = foot
    leaf = _LEAVES[scene["season"]]
    if scene["perch"] == "wire":
        brush.stroke([(-0.05, y + 0.012), (1.05, y + 0.012)], 0.02, (70, 66, 74))
    elif scene["perch"] == "stone":
        wide = rng.uniform(0.26, 0.34)
        rock = _PARTS["rock"] * (wide, 1) + foot
        brush.shape(rock, (148, 142, 140))
        brush.shape((rock - foot) * (0.8, 0.5) + foot + (-0.02, 0.01), (172, 166, 160))
    else:
        bark, slope = (112, 82, 64), rng.uniform(-0.05, 0.05)
        ends = [(-0.05, y + 0.03 - slope), (x, y + 0.02), (1.05, y + 0.03 + slope)]
        brush.stroke(ends, 0.046, bark)
        brush.stroke([(px, py - 0.012) for px, py in ends], 0.013, _mix(bark, _CREAM, 0.25))
        for side in (0.08, 0.9):
            stem = np.array([side + rng.uniform(-0.06, 0.06), y + 0.03])
            for angle in rng.uniform(0.3, 1.1) + np.array([0.0, 1.4]):
                _leaf(brush, stem, angle, rng.uniform(0.1, 0.15), leaf[2])


def _leaves(brush, scene, rng):
    """Leaves close to the eye, hanging in from one side: they may cover a part of the bird."""
    leaf = _LEAVES[scene["season"]]
    side = rng.integers(2)
    root = np.array([1.08 * side - 0.04, rng.uniform(0.1, 0.95)])
    tip = np.array([0.5 + (side - 0.5) * rng.uniform(0.25, 0.6), rng.uniform(0.3, 0.9)])
    brush.stroke([root, tip], 0.014, _mix(leaf[2], (80, 60, 50), 0.5))
    heading = math.atan2(*(tip - root)[::-1])
    for share, lean in zip(np.linspace(0.15, 1, 6), (0.9, -0.9, 0.8, -0.8, 0.7, 0), strict=True):
        colour = _mix(leaf[2], leaf[1], rng.uniform(0, 0.9))
        _leaf(brush, root + share * (tip - root), heading + lean, rng.uniform(0.13, 0.2), colour)


# ---------------------------------------------------------------- the bird
# In its own coordinates it looks to the right, a body length is about 1 and y points down.

_OUTLINES_TABLE = """
body       -0.12,-0.20 -0.34,0.07 -0.50,0.32 -0.44,0.42 -0.24,0.42 0.02,0.42 0.26,0.32 0.40,0.11 0.42,-0.08
head       0.42,-0.20 0.48,-0.32 0.46,-0.43 0.38,-0.53 0.25,-0.57 0.11,-0.51
nape       0.01,-0.36
neck       0.22,-0.22
breast     0.52,-0.30 0.36,-0.25 0.26,-0.04 0.04,0.18 -0.26,0.33 -0.50,0.44 -0.2,0.62 0.35,0.55 0.62,0.1
belly      0.2,0.2 -0.1,0.28 -0.45,0.44 0.0,0.6 0.35,0.4
crown      0.54,-0.42 0.40,-0.44 0.22,-0.45 0.04,-0.38 -0.08,-0.5 0.2,-0.7 0.5,-0.6
throat     0.54,-0.34 0.40,-0.32 0.30,-0.24 0.30,-0.10 0.42,-0.04 0.54,-0.12
crest      0.36,-0.50 0.22,-0.66 -0.04,-0.76 0.03,-0.62 -0.04,-0.56 0.05,-0.42 0.24,-0.44
eye        0.345,-0.40
eyebrow    0.45,-0.43 0.30,-0.465 0.10,-0.42
eyeline    0.45,-0.375 0.30,-0.395 0.08,-0.36
gape       0.45,-0.352 0.58,-0.345
cone       0.44,-0.46 0.56,-0.42 0.66,-0.33 0.56,-0.28 0.44,-0.26
dagger     0.44,-0.41 0.82,-0.345 0.44,-0.30
curved     0.44,-0.42 0.62,-0.41 0.77,-0.32 0.84,-0.16 0.74,-0.26 0.60,-0.33 0.44,-0.31
wing       0.24,-0.04 0.11,-0.17 -0.10,-0.09 -0.35,0.15 -0.63,0.44 -0.30,0.36 0.00,0.29 0.19,0.15
flight     -0.14,0.06 -0.35,0.18 -0.63,0.44 -0.30,0.35 -0.08,0.27 -0.06,0.16
upper_bar  0.03,-0.10 0.06,-0.01 0.06,0.09 0.03,0.20
lower_bar  -0.12,-0.03 -0.09,0.06 -0.09,0.15 -0.12,0.25
legs       -0.02,0.37 0.14,0.35
leaf       0,0 0.3,0.2 0.7,0.17 1,0 0.7,-0.17 0.3,-0.2
rock       -1,1.2 -1.05,0.2 -0.75,0.05 -0.25,0.0 0.35,0.005 0.8,0.06 1.1,0.25 1,1.2
"""  # noqa: E501
_PARTS = {
    name: np.array([point.split(",") for point in points], dtype=float)
    for name, *points in map(str.split, _OUTLINES_TABLE.strip().splitlines())
}
_TAILS = {  # (along, half width) of the upper edge, root to tip
    "square": ((0, 0.09), (0.47, 0.12), (0.50, 0.0)),
    "forked": ((0, 0.09), (0.62, 0.21), (0.36, 0.0)),
    "long": ((0, 0.09), (0.55, 0.085), (0.92, 0.0)),
}


def _rotation(angle):
    """The matrix that turns points (n, 2), as rows, by ``angle``; clockwise, as y points down."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _nod(points, angle):
    """Turn head points (n, 2) about the neck."""
    return (points - _PARTS["neck"]) @ _rotation(angle) + _PARTS["neck"]


def _tail(brush, traits, colour):
    """Drawn along its own axes: from the rump outwards, and across."""
    axes, root = np.array([[-0.8, 0.6], [0.6, 0.8]]), np.array([-0.34, 0.28])
    half = np.array(_TAILS[traits["tail"]])
    brush.shape(np.concatenate([half, half[-2::-1] * (1, -1)]) @ axes + root, colour, smooth=False)
    brush.stroke([root, root + 0.34 * axes[0]], 0.018, _mix(colour, _INK, 0.3))
    if traits["band"] == "band":
        near, far = (0.24, 0.35)
        a, b = np.interp((near, far), *half[:-1].T)
        strip = np.array([(near, a), (far, b), (far, -b), (near, -a)])
        brush.shape(strip @ axes + root, _CREAM, smooth=False)


def _legs(brush, roots, colour):
    """Two legs, plumb whatever the posture, and where they stand. All in picture widths."""
    ground = roots[:, 1].max() + 0.11
    for x, top in roots:
        brush.stroke([(x, top), (x, ground)], 0.02, colour)
        for toe in (-0.026, 0.026):
            brush.stroke([(x, ground - 0.006), (x + toe, ground + 0.006)], 0.016, colour)
    return np.array([roots[:, 0].mean(), ground])


def _plumage(sheet, traits, hue, nod, rng):
    """The body's colours without regard to its outline."""
    sheet.shape(_PARTS["breast"], hue["breast"])
    sheet.shape(_PARTS["belly"], _mix(hue["breast"], _CREAM, 0.3))
    mark = _mix(hue["breast"], _INK, 0.62)
    for i, j in np.ndindex(5, 5) if traits["pattern"] != "-" else ():
        at = (0.36 - 0.11 * i + 0.03 * j, -0.04 + 0.1 * j + 0.035 * i)
        at += rng.uniform(-0.014, 0.014, 2)
        if traits["pattern"] == "spots":
            sheet.dot(at, 0.025, mark)
        else:
            sheet.stroke([at + (0.012, -0.045), at + (-0.016, 0.045)], 0.024, mark)
    if traits["throat"] == "black":
        sheet.shape(_nod(_PARTS["throat"], nod), hue["black"])
    if traits["crown"] != "-":
        sheet.shape(_nod(_PARTS["crown"], nod), hue[traits["crown"]])


def _wing(brush, traits, colour):
    brush.shape(_PARTS["wing"] + (0.015, 0.03), (*_INK, 50))
    brush.shape(_PARTS["wing"], colour)
    brush.shape(_PARTS["flight"], _mix(colour, _INK, 0.28))
    for shift in (0.0, 0.07):
        feather = [(-0.16 + shift, 0.19 + shift / 2), (-0.5 + shift, 0.385)]
        brush.stroke(feather, 0.013, _mix(colour, _INK, 0.5))
    if traits["wing"] == "bars":
        for bar in ("upper_bar", "lower_bar"):
            brush.stroke(_PARTS[bar], 0.04, _CREAM)


def _face(brush, traits, hue, nod):
    bill = hue[traits["bill_hue"]]
    if traits["face"] == "eyeline":
        brush.stroke(_nod(_PARTS["eyebrow"], nod), 0.04, _CREAM)
        brush.stroke(_nod(_PARTS["eyeline"], nod), 0.055, hue["black"])
    brush.shape(_nod(_PARTS[traits["bill"]], nod), bill, smooth=traits["bill"] != "dagger")
    if traits["bill"] != "curved":
        brush.stroke(_nod(_PARTS["gape"], nod), 0.012, _mix(bill, _INK, 0.5))
    eye = _nod(_PARTS["eye"], nod)[0]
    if traits["face"] == "eyering":
        brush.dot(eye, 0.092, _CREAM)
    brush.dot(eye, 0.058, _INK)
    brush.dot(eye + (0.016, -0.02), 0.019, (255, 255, 255))


def _bird(image, picture, rng, perch_rng):
    """Draw the bird with its perch on ``image``."""
    traits, flip = picture.traits, -1 if picture.mirror else 1
    tilt = rng.uniform(-0.5, -0.3) if picture.scene["posture"] == "upright" else rng.uniform(0, 0.2)
    nod = picture.nod - 0.6 * tilt  # the head stays about level
    matrix = _rotation(tilt) * picture.scale * (flip, 1)
    matrix[1] *= rng.uniform(0.95, 1.07)  # some are plumper
    origin = picture.place + np.array([0.06, 0]) @ matrix
    hue = {name: _mix(rgb, rng.integers(0, 256, 3), 0.09) for name, rgb in _HUES.items()}
    hue |= {"back": hue[traits["back"]], "breast": hue[traits["breast"]], "-": hue[traits["back"]]}
    dark = _mix(hue["back"], _INK, 0.3)
    page, brush = _Brush(image), _Brush(image, matrix, origin)
    roots = _PARTS["legs"] @ matrix + origin
    _tail(brush, traits, dark)
    _perch(page, picture.scene, _legs(page, roots, hue[traits["legs"]]), perch_rng)
    _legs(page, roots, hue[traits["legs"]])  # the toes go round the branch
    if traits["crest"] == "crest":
        brush.shape(_nod(_PARTS["crest"], nod), _mix(hue[traits["crown"]], _INK, 0.15))
    outline = [_PARTS["body"], _nod(_PARTS["head"], nod), _nod(_PARTS["nape"], nod / 2)]
    body = _Brush(Image.new("L", image.size), matrix, origin)
    body.shape(np.concatenate(outline), 255)
    sheet = _Brush(Image.new("RGB", image.size, hue["back"]), matrix, origin)
    _plumage(sheet, traits, hue, nod, rng)
    image.paste(sheet.image, mask=body.image)
    _wing(brush, traits, dark)
    _face(brush, traits, hue, nod)


def render(picture, size, *, oversample=4):
    """Draw a picture at ``size`` pixels; an RGB image."""
    sky_rng, bird_rng, perch_rng, leaf_rng = np.random.default_rng(picture.grain).spawn(4)
    image = _backdrop(picture.scene, size * oversample, sky_rng)
    _bird(image, picture, bird_rng, perch_rng)
    if picture.scene["front"] == "leaves":
        _leaves(_Brush(image), picture.scene, leaf_rng)
    warmth = (1.04, 0.94, 0.86) if picture.scene["light"] == "evening" else (1, 1, 1)
    pixels = np.asarray(image.reduce(oversample)) * (np.array(picture.tint) * warmth)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------- the files


def draw_miniature(
    root,
    *,
    seed=0,
    image_size=72,
    classes=20,
    train_per_class=60,
    test_per_class=105,
):
    """Write the data set under ``root``, a folder that does not exist yet or is empty.

    The layout is that of CUB-200-2011 with ``attributes.txt`` inside, and ``attribute_roles.json``
    beside it. Raises ``UserError`` as ``new_folder`` does.
    """
    with new_folder(root) as draft:
        _write(draft, seed, image_size, classes, train_per_class, test_per_class)


def _write(root, seed, image_size, classes, train_per_class, test_per_class):
    names = list(SPECIES)[:classes]
    tables = {key: [] for key in ("images", "image_class_labels", "train_test_split")}
    rows, image_id, each = [], 0, train_per_class + test_per_class
    bar = tqdm(total=classes * each, desc="drawing birds", unit="bird", disable=None)
    for species, name in enumerate(names):
        folder = f"{species + 1:03d}.{name}"
        (root / "images" / folder).mkdir(parents=True)
        chosen = np.random.default_rng([seed, _SPLIT, species]).permutation(each)[:train_per_class]
        for number in range(1, each + 1):
            image_id += 1
            path = f"{folder}/{name}_{number:04d}.jpg"
            picture = picture_of(species, number, seed=seed)
            image = render(picture, image_size)
            image.save(root / "images" / path, quality=92, subsampling=0)
            tables["images"].append(f"{image_id} {path}")
            tables["image_class_labels"].append(f"{image_id} {species + 1}")
            tables["train_test_split"].append(f"{image_id} {int(number - 1 in chosen)}")
            rows += [f"{image_id} {i} {bit} 4 1.000" for i, bit in enumerate(picture.bits, start=1)]
            bar.update()
    bar.close()
    tables["classes"] = [f"{i} {i:03d}.{name}" for i, name in enumerate(names, start=1)]
    tables["attributes"] = [f"{i} {name}" for i, name in enumerate(ATTRIBUTES, start=1)]
    tables["attributes/image_attribute_labels"] = rows
    (root / "attributes").mkdir()
    for stem, lines in tables.items():
        (root / f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    roles = {
        "description": _DESCRIPTION,
        "roles": {name: ROLES[name] for name in ATTRIBUTES},
        "shows": _INFORMATIVE | _IRRELEVANT,
        "settings": {"seed": seed, "image_size": image_size, "untypical": UNTYPICAL},
        "species": {name: SPECIES[name] for name in names},
    }
    text = json.dumps(roles, indent=1) + "\n"
    (root / "attribute_roles.json").write_text(text, encoding="utf-8")


def draw_sheet(path):
    """A contact sheet: one bird of every species with its name, a column per genus."""
    columns, rows, gap, line, tile = 5, 4, 10, 22, 156
    size = (columns * (tile + gap) + gap, rows * (tile + line + gap) + gap)
    sheet = Image.new("RGB", size, (252, 250, 245))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    corner = Image.new("L", (tile * 4, tile * 4))
    ImageDraw.Draw(corner).rounded_rectangle((0, 0, tile * 4 - 1, tile * 4 - 1), 44, fill=255)
    for index, name in enumerate(SPECIES):
        column, row = divmod(index, rows)
        x, y = gap + column * (tile + gap), gap + row * (tile + line + gap)
        pictures = (picture_of(index, number) for number in range(1, 1_000_000))
        picture = next(p for p in pictures if _shows_well(index, p))
        sheet.paste(render(picture, tile), (x, y), corner.reduce(4))
        label = name.replace("_", " ")
        draw.text((x + tile / 2, y + tile + line / 2), label, (84, 76, 72), font=font, anchor="mm")
    sheet = sheet.quantize(256, palette=sheet.quantize(256, kmeans=4))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"cannot write the contact sheet {path}: {error.strerror}") from error


def _shows_well(index, picture):
    """Whether a picture suits the contact sheet: a typical bird, and the scenery takes turns."""
    column, row = divmod(index, 4)
    wish = {
        "background": list(SCENE["background"])[(row + column) % 4],
        "season": ("summer", "autumn")[(row // 2 + column) % 2],
        "light": ("day", "day", "evening")[(2 * row + column) % 3],
        "front": "leaves" if index in (2, 10) else "clear",
    }
    clear = picture.scale > 0.42 and min(picture.tint) > 0.92
    typical = picture.traits == list(SPECIES.values())[index]
    return clear and typical and wish.items() <= picture.scene.items()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the species of the miniature.")
    parser.add_argument("--sheet", required=True, metavar="FILE", help="PNG file to be written")
    draw_sheet(parser.parse_args(argv).sheet)


if __name__ == "__main__":
    run_script(main)
