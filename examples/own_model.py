"""An own model on an own table: a noisy regression target, five auxiliary regression tasks.

    python -m examples.own_model

500 rows of 20 inputs. 40 % of the training targets are permuted, 50 rows are clean. Three of the
auxiliary tasks share the target's inputs, two are noise. Prints the test error (mean squared error;
always predicting the mean gives 1) with equal weights and with JTDS.
"""

import torch
from torch import nn

from auxilearn import Bilevel, MonoJoint, TaskLosses
from auxilearn.hypernet import Identity

TASKS, WIDTH = 6, 32


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, WIDTH), nn.Tanh())
        self.heads = nn.Linear(WIDTH, TASKS)

    def forward(self, batch):
        inputs, targets = batch
        features = self.body(inputs)
        return TaskLosses((self.heads(features) - targets).square(), features)


def rows(count, share_wrong=0.0):
    inputs = torch.randn(count, 20)
    target = inputs[:, :5].sum(dim=1, keepdim=True) / 5**0.5
    useful = torch.stack([inputs[:, i : i + 3].sum(dim=1) / 3**0.5 for i in range(3)], dim=1)
    wrong = torch.rand(count) < share_wrong
    target[wrong] = target[wrong][torch.randperm(int(wrong.sum()))]
    return inputs, torch.cat([target, useful, torch.randn(count, 2)], dim=1)


def train(scheduler, upper=None):
    torch.manual_seed(0)
    data, dev, test = rows(500, share_wrong=0.4), rows(50), rows(2000)
    model = Model()
    bilevel = Bilevel(model, scheduler, torch.optim.Adam(model.parameters(), lr=1e-2), upper)
    for step in range(1, 1001):
        chosen = torch.randint(500, (50,))
        bilevel.lower_step((data[0][chosen], data[1][chosen]))
        if upper and step % 5 == 0:
            bilevel.upper_step([data], [dev])
    return model(test).losses[:, 0].mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    jtds = MonoJoint(main_task=0, input_dim=TASKS, feature_dim=WIDTH)
    print(f"equal weights  {train(Identity(0, TASKS)):.2f}")
    print(f"JTDS           {train(jtds, torch.optim.SGD(jtds.parameters(), lr=0.1)):.2f}")
