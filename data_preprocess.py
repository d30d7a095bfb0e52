"""Divide a data set of CUB-200-2011's layout into the sets that training uses.

  python data_preprocess.py --download                  fetch CUB-200-2011 (1.1 GB), divide it
  python data_preprocess.py --data_root /data/CUB_200_2011
  python data_preprocess.py --generate mini             no download: a small drawn data set
  python data_preprocess.py --generate digits           no download: 1,797 scanned digits

Written to --out_dir (see preprocess_data/README.md for the shapes):

  image_dictionary.json   image id: [path, class, attribute bits]
  full_train_set.json     the official training images
  aux_set.json            the development set: the first --aux_shot training images of each class
  rest_train_set.json     the official training images without the development set
  valid_set.json          half of the official test images, shuffled by --split_seed
  test_set.json           the other half
  split_info.json         seed, names, counts and checksums; training compares them at its start

All input is checked first; if a check fails, nothing is written. Running it again changes nothing
unless the input or an option changed.
"""

import argparse
from pathlib import Path

from auxilearn.data import cub
from auxilearn.data.split import combined_fingerprint, write_split
from auxilearn.errors import Parser, UserError, run_script

DEFAULT_ROOTS = {None: "CUB_200_2011", "mini": "miniature", "digits": "digits"}


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data_root",
        type=Path,
        metavar="DIR",
        help="the folder that holds images.txt and images/ "
        "(default: CUB_200_2011; with --generate: miniature or digits)",
    )
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("preprocess_data"),
        metavar="DIR",
        help="where the JSON files go (default: %(default)s)",
    )
    parser.add_argument(
        "--aux_shot",
        type=_integer_from(1),
        default=1,
        metavar="N",
        help="development images per class (default: %(default)s)",
    )
    parser.add_argument(
        "--split_seed",
        type=_integer_from(0),
        default=5,
        metavar="N",
        help="seed of the division into validation and test set (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--download",
        action="store_true",
        help="fetch CUB-200-2011 into the folder above --data_root first, unless it is there; an "
        "interrupted download is continued, and a CUB_200_2011.tgz put there by hand is used",
    )
    source.add_argument(
        "--generate",
        choices=("mini", "digits"),
        help="write this embedded data set to --data_root first, unless it is there "
        "(digits needs scikit-learn)",
    )
    parser.add_argument(
        "--check_images",
        action="store_true",
        help="decode every image in full (default: see that each file is there and not empty)",
    )
    args = parser.parse_args(argv)
    if args.data_root is None:
        args.data_root = Path(DEFAULT_ROOTS[args.generate])
    return args


def _integer_from(least):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from {least} up")
        return value

    return parse


def main(argv=None):
    args = parse_arguments(argv)
    if args.download:
        download(args.data_root)
    if args.generate:
        generate(args.generate, args.data_root)
    annotations = cub.read_annotations(args.data_root)
    if args.check_images:
        cub.check_images(annotations)
    written = write_split(args.out_dir, annotations, args.aux_shot, args.split_seed)
    print_summary(args.out_dir, written)


def download(root):
    from auxilearn.data.download import CUB_FOLDER, fetch_cub

    if root.name != CUB_FOLDER:
        raise UserError(
            f"--download unpacks to a folder named {CUB_FOLDER}, but --data_root is {root}; "
            f"give --data_root {root.parent / CUB_FOLDER}"
        )
    fetch_cub(root.parent)


def generate(kind, root):
    """Write an embedded data set to ``root``, unless it is there. Other data is never touched."""
    if not root.is_dir() or not any(root.iterdir()):
        if kind == "digits":
            from auxilearn.data.digits import write_digits

            write_digits(root)
        else:
            from auxilearn.data.miniature import draw_miniature

            draw_miniature(root)
        return
    try:
        names = cub.read_annotations(root).class_names
    except UserError as error:
        raise UserError(
            f"{root} is not empty, but not a complete data set ({error}); "
            "move it away, or give another --data_root"
        ) from None
    is_digits = names[0] == "001.zero"
    if not (root / cub.ROLES).is_file() or is_digits != (kind == "digits"):
        raise UserError(
            f"{root} holds another data set (its first class is {names[0]}); "
            f"give another --data_root to generate {kind}"
        )


def print_summary(out_dir, written):
    info = written.info
    counts = info["counts"]
    for copy in written.kept:
        print(f"kept an edited file as {copy}")
    print(f"data set     {info['data_root']}")
    print(
        f"             {counts['images']:,} images, {counts['classes']:,} classes, "
        f"{counts['attributes']:,} attributes"
    )
    print(
        f"training     {counts['full_train']:,} = {counts['rest_train']:,} + {counts['dev']:,} "
        f"for development ({info['aux_shot']} per class)"
    )
    print(
        f"testing      {counts['valid']:,} for validation, {counts['test']:,} for the test "
        f"(seed {info['split_seed']})"
    )
    print(f"fingerprint  {combined_fingerprint(info)[:12]}")
    print(f"{'written to' if written.changed else 'already up to date:'} {out_dir}")


if __name__ == "__main__":
    run_script(main)
