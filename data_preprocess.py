"""Divide a data set into the sets that training uses.

  python data_preprocess.py --table samples.csv --target species              rows of columns
  python data_preprocess.py --table samples.csv --target species --images photos
  python data_preprocess.py --images photos             one folder of images per class
  python data_preprocess.py --dataset cifar100 --download      or pets: torchvision fetches it
  python data_preprocess.py --dataset movielens --data_root ml-1m   MovieLens-1M as published
  python data_preprocess.py --download                  fetch CUB-200-2011 (1.1 GB), divide it
  python data_preprocess.py --data_root /data/CUB_200_2011       any data of its layout
  python data_preprocess.py --generate mini             no download: a small drawn data set
  python data_preprocess.py --generate digits           no download: 1,797 scanned digits

Of a table, the guess for every column (role, kind, values, missing) is printed to be checked;
--kinds and the flags of roles correct it. --out_dir gets tasks.json and a .npy file per column; of
data in CUB's layout it gets these (preprocess_data/README.md has the shapes):

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
import shlex
import sys
from pathlib import Path

from auxilearn.data import cub, movielens, table
from auxilearn.data.columns import write_columns
from auxilearn.data.folder import folder_columns
from auxilearn.data.image_files import check_images
from auxilearn.data.sets import DEV_SIZE, TENTH
from auxilearn.data.split import combined_fingerprint, write_split
from auxilearn.errors import Parser, UserError, integer_from, run_script

DEFAULT_ROOTS = {"cub": "CUB_200_2011", "mini": "miniature", "digits": "digits"}
DEFAULT_ROOTS |= {"cifar100": "cifar100", "pets": "pets", "movielens": "ml-1m"}
PUBLISHED = ("cifar100", "pets", "movielens")


def parse_arguments(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--data_root",
        type=Path,
        metavar="DIR",
        help="the folder of a published data set, or of another in CUB's layout (default: "
        "CUB_200_2011, miniature, digits, cifar100, pets or ml-1m)",
    )
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("preprocess_data"),
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    parser.add_argument(
        "--aux_shot",
        type=integer_from(1),
        metavar="N",
        help="development samples per class (default: 1)",
    )
    parser.add_argument(
        "--dev_size",
        type=integer_from(1),
        metavar="N",
        help="not for CUB's layout: so many development samples in all (default, of a target that "
        "is a number: a tenth of the training set, at most 200; of movielens, at most 512)",
    )
    parser.add_argument(
        "--dev_from",
        choices=("train", "valid"),
        default="train",
        help="the set that gives the development samples (default: %(default)s)",
    )
    parser.add_argument(
        "--split_seed",
        type=integer_from(0),
        default=5,
        metavar="N",
        help="seed of the division into sets (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        choices=("cub", *PUBLISHED),
        default="cub",
        help="the published data set in --data_root, with its own sets (movielens has none: a "
        "tenth each is drawn for validation and the test)",
    )
    add_table_flags(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--download",
        action="store_true",
        help="fetch the data set first, unless it is there: cifar100 and pets into --data_root; "
        "CUB into the folder above --data_root, where an interrupted download is continued and a "
        "CUB_200_2011.tgz put there by hand is used",
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
    check_table_flags(args)
    if args.data_root is None:
        args.data_root = Path(DEFAULT_ROOTS[args.generate or args.dataset])
    return args


# Flags that only a table has.
OF_TABLES = ("image_column", "auxiliary", "features", "ignore", "set_column", "kinds")


def add_table_flags(parser):
    group = parser.add_argument_group("own data: a table, images, or both")
    group.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="CSV: a row per sample under a line of column names; the separator is a comma, "
        "semicolon or tab",
    )
    group.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="the images of the table's rows; without --table, one folder of images per class",
    )
    group.add_argument(
        "--target",
        metavar="COLUMN",
        help="the target task (default, with --images: the folder that an image is in; fine, breed "
        "and click of the published data sets)",
    )
    columns = {
        "auxiliary": "auxiliary tasks (with --images, all columns that are not named)",
        "features": "inputs (without --images, all columns that are not named)",
        "ignore": "not used",
    }
    for name, text in columns.items():
        group.add_argument(f"--{name}", nargs="+", default=[], metavar="COLUMN", help=text)
    group.add_argument(
        "--image_column",
        metavar="COLUMN",
        help="paths of images below --images (default: the first column that begins with one)",
    )
    group.add_argument(
        "--set_column",
        metavar="COLUMN",
        help="train, valid, test or dev of every row (default: a tenth of each class is drawn for "
        "validation, a tenth for the test; without valid, half of the test rows are)",
    )
    group.add_argument(
        "--kinds",
        nargs="+",
        type=_kind,
        default=[],
        metavar="COLUMN=KIND",
        help="number or classes, where the guess is wrong",
    )


def check_table_flags(args):
    """Raises UserError: flags that do not go together."""
    own, published = args.table or args.images, args.dataset in PUBLISHED
    for name in OF_TABLES:
        if getattr(args, name) and not args.table:
            raise UserError(f"--{name} is about the columns of a table: give --table FILE")
    if args.target and not args.table and not published:
        raise UserError("--target is for --table and --dataset: give one of them")
    if args.image_column and not args.images:
        raise UserError("--image_column needs --images, the folder that its paths start from")
    if args.table and not args.target and not args.images:
        raise UserError("--table needs --target COLUMN, what is to be predicted")
    if args.dev_size and not own and not published:
        raise UserError("--dev_size is not for CUB's layout: give --aux_shot")
    if args.check_images and args.table and not args.images:
        raise UserError("--check_images needs --images: without them the samples are rows")
    if args.dev_size and args.aux_shot:
        raise UserError("--dev_size and --aux_shot exclude each other")
    for name in ("data_root", "download", "generate"):
        if own and getattr(args, name):
            raise UserError(f"--{name} is not for --table and --images: leave it out")
    if published and (own or args.generate):
        raise UserError(f"--dataset {args.dataset} excludes --table, --images and --generate")
    if args.dataset == "movielens" and args.download:
        raise UserError(
            f"--download is not for movielens: unpack {movielens.URL} and give ml-1m as --data_root"
        )


def _kind(text):
    name, _, kind = text.rpartition("=")
    if not name or kind not in (table.NUMBER, table.CLASSES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected COLUMN=number or COLUMN=classes")
    return name, kind


def main(argv=None):
    args = parse_arguments(argv)
    if args.table or args.images or args.dataset in PUBLISHED:
        return prepare_columns(args, sys.argv[1:] if argv is None else argv)
    if args.download:
        download(args.data_root)
    if args.generate:
        generate(args.generate, args.data_root)
    annotations = cub.read_annotations(args.data_root)
    if args.check_images:
        cub.check_images(annotations)
    aux_shot = args.aux_shot or 1
    written = write_split(args.out_dir, annotations, aux_shot, args.split_seed, args.dev_from)
    print_summary(args.out_dir, written)
    return None


def prepare_columns(args, words):
    """Prepare a table, a folder of images or a published data set. ``words``: the command line."""
    division = {
        "aux_shot": args.aux_shot,
        "dev_size": args.dev_size,
        "dev_from": args.dev_from,
        "seed": args.split_seed,
    }
    if args.dataset in PUBLISHED:
        columns = read_published(args, division)
    elif args.table:
        columns = read_own_table(args, division)
    else:
        columns = folder_columns(args.images, **division)
    if args.check_images and columns.paths:
        check_images(columns.root, columns.paths)
    aux_shot = args.aux_shot or 1  # unless the development set is of another kind
    if args.dev_size or len(columns.sets["dev"]) != aux_shot * (columns.tasks[0].classes or 0):
        aux_shot = None
    info, changed = write_columns(
        args.out_dir,
        columns,
        split_seed=args.split_seed,
        aux_shot=aux_shot,
        dev_size=args.dev_size,
        dev_from=args.dev_from,
        command=shlex.join(["python", "data_preprocess.py", *map(str, words)]),
    )
    counts, target = info["counts"], columns.tasks[0]
    what = "images" if columns.paths else f"rows of {counts['features']} features"
    source, others = args.table or args.images or args.data_root, counts["tasks"] - 1
    print(f"data set     {source}: {counts['samples']:,} {what}")
    print(
        f"target       {target.name}, {target.kind}; {others} auxiliary task{'s' * (others != 1)}"
    )
    print_sets(counts, info)
    enough = min(DEV_SIZE, counts["full_train"] // TENTH)
    if counts["dev"] < enough:
        print(
            f"note         {counts['dev']} development samples are few to learn a schedule from: "
            f"--dev_size {enough} takes more"
        )
    print(f"{'written to' if changed else 'already up to date:'} {args.out_dir}")


def read_published(args, division):
    """The ``Columns`` of --dataset."""
    if args.target:
        division = {**division, "target": args.target}
    if args.dataset == "movielens":
        return movielens.movielens_columns(args.data_root, **division)
    from auxilearn.data import torchvision_sets  # torch takes seconds to import

    read = {"cifar100": torchvision_sets.cifar100_columns, "pets": torchvision_sets.pets_columns}
    return read[args.dataset](args.data_root, download=args.download, **division)


def read_own_table(args, division):
    """The ``Columns`` of --table; prints what is guessed of its columns."""
    found = table.read_table(args.table)
    other = {}
    image_column = args.image_column
    if args.images:
        if not args.images.is_dir():
            raise UserError(f"--images {args.images}: no such folder")
        image_column = image_column or table.image_column_of(found, args.images)
        other[found.column(image_column, "--image_column").name] = "path of the image"
    if args.set_column:
        other[found.column(args.set_column, "--set_column").name] = "name of the set"
    choices = table.choose(
        found,
        target=args.target,
        images=bool(args.images),
        auxiliary=args.auxiliary,
        features=args.features,
        ignore=args.ignore,
        other=other,
        kinds=dict(args.kinds),
    )
    print("\n".join(table.described(choices)))
    print("(wrong? --kinds COLUMN=number or classes; --auxiliary, --features, --ignore COLUMN)\n")
    return table.table_columns(
        found,
        choices,
        images=args.images,
        image_column=image_column,
        set_column=args.set_column,
        **division,
    )


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
    print_sets(counts, info)
    print(f"fingerprint  {combined_fingerprint(info)[:12]}")
    print(f"{'written to' if written.changed else 'already up to date:'} {out_dir}")


def print_sets(counts, info):
    per_class = f" ({info['aux_shot']} per class)" if info["aux_shot"] else ""
    print(
        f"training     {counts['full_train']:,} = {counts['rest_train']:,} + {counts['dev']:,} "
        f"for development{per_class}"
    )
    print(
        f"testing      {counts['valid']:,} for validation, {counts['test']:,} for the test "
        f"(seed {info['split_seed']})"
    )


if __name__ == "__main__":
    run_script(main)
