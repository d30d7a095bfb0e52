"""An own scheduler: a learned weight for every class of the target, under every task.

    python data_preprocess.py --generate mini --data_root miniature/data \
      --out_dir miniature/preprocess_data
    python train_bilevel.py --plugin examples/weight_per_class.py --method per_class \
      --split_dir miniature/preprocess_data --backbone convnet --image_size 32 --main_lr 1e-3 \
      --epochs 5 --dev_batch_size 20 --option bound=3
    python reproduce_tables.py table2 --dataset mini --plugin examples/weight_per_class.py \
      --methods common joint per_class --seeds 1 --epochs 5

W_ik = bound * sigmoid(v[y_i, k]), v = 0 at first; y_i is the label that sample i is trained on.
"""

import torch
from torch import nn

from auxilearn import HyperNet, register
from auxilearn.hypernet import weighted_mean


class WeightPerClass(HyperNet):
    def __init__(self, tasks, classes, bound):
        super().__init__(main_task=0, input_dim=tasks)
        self.values = nn.Parameter(torch.zeros(classes, tasks))
        self.bound = bound

    def scheduled_loss(self, losses, seen):
        weights = self.bound * torch.sigmoid(self.values[seen.labels[:, 0]])  # (B, K)
        return weighted_mean(weights, losses, seen.mask)


@register(
    "per_class",
    title="Weight per class",
    about="a learned weight for every class of the target, under every task",
    learned="upper",
    tune=[{"upper_lr": 1e-2}, {"upper_lr": 1e-1}],
)
def build(problem, bound=2.0):
    return WeightPerClass(problem.tasks, problem.classes[0], bound)
