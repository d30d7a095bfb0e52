"""How fast images reach training: decoded every time, or from the cache.

  python benchmarks/input_pipeline.py                  # per core: one process, one thread
  python benchmarks/input_pipeline.py --num_workers 2  # delivered by two worker processes

writes CUB-like JPEGs (500 x 375, about 95 KB each, as CUB's are) to a temporary folder, and loads
batches of them with the training augmentation at 224 pixels in three ways, in alternation:

  plain    benchmarks/plain.py: torchvision's transforms on Pillow's images, one by one
  decode   this project's stream with --cache_dir none
  cache    this project's stream with a cache

Each round restarts every stream and lets it run in before it is timed. Without workers the time is
the process's own CPU time, so that other load on the machine matters little; with workers it is the
clock's.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from auxilearn.data.cache import open_cache  # noqa: E402
from auxilearn.data.dataset import DecodedImages, EndlessBatches, Stream, sample_set  # noqa: E402
from auxilearn.data.split import Split  # noqa: E402
from benchmarks.plain import PlainDataset  # noqa: E402

WIDTH, HEIGHT, IMAGE_SIZE = 500, 375, 224
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
        image_ids=names,
        paths=names,
        labels=rng.integers(CUB_CLASSES, size=len(names)),
        attributes=rng.integers(2, size=(len(names), CUB_ATTRIBUTES), dtype=np.uint8),
        indices={"full_train": np.arange(len(names))},
        class_names=[f"class_{number}" for number in range(CUB_CLASSES)],
        attribute_names=[f"attribute_{number}" for number in range(CUB_ATTRIBUTES)],
        attribute_roles=None,
        data_root=root,
        info={},
        fingerprint="",
    )


def plain_batches(split, batch_size, workers):
    paths = [split.image_path(position) for position in range(len(split.paths))]
    dataset = PlainDataset(paths, np.column_stack([split.labels, split.attributes]), train=True)
    order = EndlessBatches(len(dataset), batch_size, 5, "benchmark")
    batches = ([place for place, _ in keys] for keys in order)
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers))


def stream_batches(images, split, batch_size, workers):
    samples = sample_set(split, "full_train", 1 + CUB_ATTRIBUTES)
    stream = Stream(
        images,
        samples,
        EndlessBatches(len(samples), batch_size, 5, "benchmark"),
        IMAGE_SIZE,
        torch.device("cpu"),
        augment=True,
        seed=5,
        name="benchmark",
        workers=workers,
    )
    return iter(stream)


def measure(ways, args):
    """{way: [images a second, round after round]}."""
    clock = time.perf_counter if args.num_workers else time.process_time
    rates = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, start_stream in ways.items():
            batches = start_stream()
            for _ in range(1 + 4 * args.num_workers):  # more than workers keep in store
                next(batches)
            start = clock()
            for _ in range(args.batches):
                next(batches)
            rates[name].append(args.batches * args.batch_size / (clock() - start))
            del batches  # and with it the workers
    return rates


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("images", 256),
        ("batch_size", 64),
        ("batches", 8),
        ("rounds", 9),
        ("num_workers", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    if args.images % args.batch_size:
        parser.error("--images must be a multiple of --batch_size")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        split = as_split(root, write_images(root, args.images))
        kilobytes = statistics.mean(p.stat().st_size for p in root.glob("images/*")) / 1e3
        print(f"{args.images} images, {kilobytes:.0f} KB each")
        start = time.perf_counter()
        cached = open_cache(split, IMAGE_SIZE, root / "cache", args.num_workers)
        seconds = (time.perf_counter() - start) / args.images
        print(
            f"built in {1e3 * seconds:.2f} ms an image: {seconds * CUB_IMAGES:.0f} s for CUB's "
            f"{CUB_IMAGES:,}"
        )
        decoded = DecodedImages(split, IMAGE_SIZE)
        size, workers = args.batch_size, args.num_workers
        ways = {
            "plain": functools.partial(plain_batches, split, size, workers),
            "decode": functools.partial(stream_batches, decoded, split, size, workers),
            "cache": functools.partial(stream_batches, cached, split, size, workers),
        }
        rates = measure(ways, args)
    unit = f"from {args.num_workers} worker(s)" if args.num_workers else "per core"
    print(f"\nimages a second {unit}   median (lowest to highest)   cache faster by")
    for name, values in rates.items():
        pairs = zip(rates["cache"], values, strict=True)
        ratio = statistics.median(cache / value for cache, value in pairs)
        low, high = min(values), max(values)
        print(f"{name:8} {statistics.median(values):6.0f} ({low:.0f} to {high:.0f})   {ratio:.1f}")


if __name__ == "__main__":
    main()
