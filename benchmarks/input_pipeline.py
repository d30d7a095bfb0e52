"""How long images take to become batches, on the CPU and on one thread.

  python benchmarks/input_pipeline.py                  # decodes in the main thread
  python benchmarks/input_pipeline.py --num_workers 2  # in two threads

prints two tables. The first: milliseconds that a batch of views takes from its windows, by products
of matrices and one by one; and that a whole batch takes from pixels in memory, labels included. The
faster way belongs into ``auxilearn.data.views.PRODUCTS_UP_TO``. The second: images a second from
CUB-like JPEGs (500 x 375, about 95 KB each, as CUB's are) to batches of training views at 224
pixels, decoded each time and from a cache.

The ways take turns. Times are medians over the rounds: of the process's own CPU time, so that other
load on the machine matters little; with threads that decode, of the clock's.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from auxilearn.data.cache import open_images  # noqa: E402
from auxilearn.data.contract import Split  # noqa: E402
from auxilearn.data.dataset import Stream, sample_set, shuffled  # noqa: E402
from auxilearn.data.pixels import PackedImages, resized_side  # noqa: E402
from auxilearn.data.split import cub_tasks  # noqa: E402
from auxilearn.data.views import PRODUCTS_UP_TO, Resizer, draw_views, largest_side  # noqa: E402

WIDTH, HEIGHT = 500, 375
SIZES = (16, 24, 32, 48, 64, 96, 128, 224)  # of views
RATIO = 4 / 3  # of images in memory, as most of CUB's
LAYERS = ((4, 40), (16, 25), (64, 20), (250, 29))  # (cells across, contrast): makes 95 KB
CUB_IMAGES, CUB_CLASSES, CUB_ATTRIBUTES = 11_788, 200, 312


def write_images(root, count, seed=0):
    """Write ``count`` random pictures with structure at every scale to root/images: their names."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir()
    names = [f"{number:05d}.jpg" for number in range(count)]
    for name in names:
        picture = np.full((HEIGHT, WIDTH, 3), 128.0)
        for cells, contrast in LAYERS:
            noise = rng.normal(128, contrast, (cells * 3 // 4, cells, 3)).clip(0, 255)
            layer = Image.fromarray(noise.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
            picture += np.asarray(layer) - 128.0
        picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        picture.save(root / "images" / name, quality=90)
    return names


def as_split(root, names):
    """A split with all images in its training set, random labels and attributes."""
    rng = np.random.default_rng(0)
    return Split(
        **random_labels(rng, len(names), CUB_CLASSES, CUB_ATTRIBUTES),
        mask=None,
        indices={"full_train": np.arange(len(names))},
        ids=names,
        data_root=root,
        info={},
        fingerprint="",
        paths=names,
        image_folder=root and root / "images",
    )


def random_labels(rng, images, classes, attributes):
    """{"tasks", "labels"} of a ``Split`` of CUB's kind."""
    labels = rng.integers(classes, size=images)
    bits = rng.integers(2, size=(images, attributes), dtype=np.uint8)
    class_names = [f"class_{number}" for number in range(classes)]
    attribute_names = [f"attribute_{number}" for number in range(attributes)]
    return {
        "tasks": cub_tasks(class_names, attribute_names),
        "labels": np.column_stack([labels, bits]),
    }


def stream_of(images, split, image_size, batch_size):
    samples = sample_set(split, "full_train", split.tasks)
    order = shuffled(len(samples), batch_size, 5, "benchmark")
    options = {"augment": True, "seed": 5, "name": "benchmark"}
    return iter(Stream(images, samples, order, image_size, torch.device("cpu"), **options))


def alternately(ways, rounds, calls, clock):
    """{name: median seconds a call} of ``ways`` {name: function}, after a call of each."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, function in ways.items():
            start = clock()
            for _ in range(calls if number else 1):
                function()
            if number:
                seconds[name].append((clock() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def views_table(args):
    print(f"milliseconds a batch of {args.batch_size} views, one thread\n")
    print("| pixels | products | one by one | used | whole batch, from memory |")
    print("|--:|--:|--:|---|--:|")
    for size in SIZES:
        side = resized_side(size)
        shapes = np.tile([side, int(side * RATIO)], (args.images, 1))
        area = int(shapes[0].prod())
        pixels = np.random.default_rng(0).integers(
            256, size=(args.images * area, 3), dtype=np.uint8
        )
        images = PackedImages(pixels, shapes, np.arange(args.images) * area)
        boxes = draw_views(5, "benchmark", 0, shapes)[: args.batch_size]
        windows = torch.from_numpy(pixels[: len(boxes) * area].reshape(len(boxes), *shapes[0], 3))
        windows = windows[:, : boxes[:, 2].max(), : boxes[:, 3].max()].contiguous()
        resizer = Resizer(size, largest_side(shapes), torch.device("cpu"))
        tensor = torch.from_numpy(boxes)
        split = as_split(None, [str(number) for number in range(args.images)])
        batches = stream_of(images, split, size, args.batch_size)
        ways = {
            "products": lambda r=resizer, w=windows, b=tensor: r.products(w, b),
            "one by one": lambda r=resizer, w=windows, b=boxes: r.one_by_one(w, b),
            "whole": lambda b=batches: next(b),
        }
        # All of one pass, whose drawing is part of it.
        calls = args.images // args.batch_size
        times = alternately(ways, args.rounds, calls, time.process_time)
        used = "products" if size <= PRODUCTS_UP_TO else "one by one"
        row = [f"{1e3 * times[name]:.2f}" for name in ("products", "one by one")]
        print(f"| {size} | {' | '.join(row)} | {used} | {1e3 * times['whole']:.2f} |", flush=True)


def files_table(args):
    clock = time.perf_counter if args.num_workers else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        split = as_split(root, write_images(root, args.images))
        kilobytes = statistics.mean(p.stat().st_size for p in root.glob("images/*")) / 1e3
        print(f"\n{args.images} images of {WIDTH} x {HEIGHT}, {kilobytes:.0f} KB each")
        start = clock()
        cached = open_images(split, 224, root / "cache", args.num_workers)
        seconds = (clock() - start) / args.images
        decoded = open_images(split, 224, "none", args.num_workers)
        streams = {
            "decoded each time": stream_of(decoded, split, 224, args.batch_size),
            "from the cache": stream_of(cached, split, 224, args.batch_size),
        }
        ways = {name: (lambda s=stream: next(s)) for name, stream in streams.items()}
        times = alternately(ways, args.rounds, 4, clock)
    print(
        f"cache built in {1e3 * seconds:.2f} ms an image: {seconds * CUB_IMAGES:.0f} s for CUB's "
        f"{CUB_IMAGES:,}\n"
    )
    threads = f"{args.num_workers} threads that decode" if args.num_workers else "the main thread"
    print(f"| images a second, {threads} | |")
    print("|---|--:|")
    for name, value in times.items():
        print(f"| {name} | {args.batch_size / value:.0f} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("images", 256), ("batch_size", 32), ("rounds", 9), ("num_workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    if args.images % args.batch_size:
        parser.error("--images must be a multiple of --batch_size")
    torch.set_num_threads(1)
    views_table(args)
    files_table(args)


if __name__ == "__main__":
    main()
