"""Train a task model with a scheduler of its losses, and test it.

  python data_preprocess.py --data_root CUB_200_2011
  python train_bilevel.py --method joint --train_batch_size 64 --epochs 100

writes RECORD_DIR/<full|semi|noisy>/EXP_NAME with config.json, metrics.jsonl, log.txt, best.pt and
summary.json, and ends with the test accuracy of the checkpoint that was best in validation.
"""

from auxilearn.errors import run_script
from auxilearn.run.config import parse
from auxilearn.trainer import train


def main():
    train(parse(description=__doc__))


if __name__ == "__main__":
    run_script(main)
