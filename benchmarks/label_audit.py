"""How well wrong labels are found by weight, loss, margin, and loss and margin together.

  python benchmarks/label_audit.py RUN_DIR ...

Prints a Markdown table of finished runs with corrupted labels. A cell is a mean over seeds: the
area under the ROC curve / the share of wrong labels among the first n, n the number of wrong ones.
docs/label_audit.md says how its runs were made.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from auxilearn.errors import UserError, run_script  # noqa: E402
from auxilearn.report.findings import WORDS, find  # noqa: E402
from auxilearn.report.run import evaluate_run, read_run  # noqa: E402


def measured(directory):
    """((corruption, rate, method), {ranking: (area, precision)}, validation accuracy)."""
    run = read_run(directory)
    evaluation = evaluate_run(run, device="cpu")
    findings = find(run, evaluation)
    if not findings.truth:
        raise UserError(f"{directory}: no label is known to be wrong")
    wrong = findings.labels.wrong.to_numpy()
    scores = {}
    for name, (area, _) in findings.truth.items():
        first = np.argsort(-findings.scores[name].to_numpy(), kind="stable")[: wrong.sum()]
        scores[name] = area, wrong[first].mean()
    config = run.config
    return (config.corruption, run.corrupted_rate, config.method), scores, evaluation.valid


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    groups = defaultdict(list)
    for directory in parser.parse_args().runs:
        key, *result = measured(directory)
        groups[key].append(result)
    print(f"| noise | method | runs | validation | {' | '.join(WORDS)} |")
    print(f"|---|---|--:|--:|{'--:|' * len(WORDS)}")
    for (corruption, rate, method), results in sorted(groups.items()):
        accuracy = np.mean([valid for _, valid in results])
        cells = [f"{corruption} {rate:.0%}", method, len(results), f"{accuracy:.0%}"]
        for name in WORDS.values():
            values = [scores[name] for scores, _ in results if name in scores]
            text = "{:.3f} / {:.2f}".format(*np.mean(values, axis=0)) if values else ""
            cells.append(text)
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    run_script(main)
