"""Look at what the scheduler of a training run learned, or predict with its model.

  python inspect_schedule.py bird_record/noisy/train_joint_seed5
  python inspect_schedule.py bird_record/noisy/train_joint_seed5 --predict new_photos

The first writes RUN_DIR/report: index.html, one page that can be read offline; its charts as PNG
and SVG; the tables tasks.csv, samples.csv, clean_labels.csv and, of a target of classes,
classes.csv; and weights.npz, the weights of all samples under all tasks. The run may still be
training: its best checkpoint so far is shown. The command makes one pass over the training set. It
needs the packages of requirements-report.txt.

The second writes RUN_DIR/predictions.csv: for every image below a folder, or every row of a table
with the columns that were trained on, the predictions of the best checkpoint under all tasks, with
class names. An auxiliary task that the schedule hardly weighed is hardly learned.
"""

from pathlib import Path

from auxilearn.errors import Parser, integer_from, run_script
from auxilearn.methods import load_plugin


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="folder of the run: RECORD_DIR/<full|semi|noisy>/NAME",
    )
    add(
        "--predict",
        type=Path,
        metavar="PATH",
        help="a folder of images or a table, as the run was trained on; no report is written",
    )
    add(
        "--out",
        type=Path,
        metavar="PATH",
        help="folder of the report (default: RUN_DIR/report), or file of the predictions (default: "
        "RUN_DIR/predictions.csv)",
    )
    add(
        "--rank_by",
        choices=("auto", "margin", "weight", "loss"),
        default="auto",
        help="rank labels by low mean margin over training, by low target weight or by high target "
        "loss; auto takes the loss, and of a weak model (validation accuracy below 60 %%) loss and "
        "margin together (default: %(default)s)",
    )
    add(
        "--sheets",
        metavar="NAME",
        nargs="+",
        default=(),
        help="tasks that must have a contact sheet, named as in tasks.csv (the page adds others "
        "from both ends of the ranking)",
    )
    add("--plugin", type=Path, metavar="FILE", help="the file that registers the run's method")
    add("--split_dir", type=Path, metavar="DIR", help="the split, if it was moved")
    add("--data_root", type=Path, metavar="DIR", help="the data, if they were moved")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: the first GPU, else cpu)")
    add(
        "--num_workers",
        metavar="N",
        type=integer_from(0),
        help="threads that decode images where there is no cache (default: the run's)",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="also write the metrics and the schedule's history as events for TensorBoard",
    )
    return parser.parse_args()


def main():
    args = vars(parse_arguments())
    if plugin := args.pop("plugin"):
        load_plugin(plugin)
    if source := args.pop("predict"):
        from auxilearn.run.predict import predict

        how = {name: args[name] for name in ("out", "device", "num_workers")}
        print(f"written to {predict(args['run_dir'], source, **how)}")
        return
    from auxilearn.report.write import write_report  # needs more packages

    page, statements = write_report(**args)
    for statement in statements:
        print(f"{statement.topic}: {statement.text}")
    print(f"written to {page}")


if __name__ == "__main__":
    run_script(main)
