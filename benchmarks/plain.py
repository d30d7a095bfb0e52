"""The method as one would first write it: the speed baseline and the exactness reference.

Joint task and data scheduling with the ordinary tools: a torchvision ResNet-18, one ``nn.Linear``
and one ``F.cross_entropy`` call per task, PIL and torchvision transforms in the loading loop, and
the hypergradient by double backward through ``torch.autograd.grad``. It needs torch, torchvision
and PIL, and nothing of the ``auxilearn`` package, so that the two can be compared. It is meant to
be right and readable, neither tuned nor slowed down.

    theta, phi   parameters of the task model (lower level) and of the scheduler (upper level)
    L, W         losses and schedule, both (B, K); task 0 is the target
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import models, transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resnet18_backbone(weights=None):
    """A ResNet-18 that returns its 512 pooled features; ``weights`` as torchvision takes it."""
    backbone = models.resnet18(weights=weights)
    backbone.fc = nn.Identity()
    return backbone


class PlainModel(nn.Module):
    """A backbone with one linear head per task.

    Args:
        backbone: module from images to features (B, feature_dim).
        feature_dim: width of the features.
        class_counts: number of classes of each of the K tasks, the target first.
        bf16: whether the backbone computes under torch.autocast.
    """

    def __init__(self, backbone, feature_dim, class_counts, bf16=False):
        super().__init__()
        self.backbone, self.bf16 = backbone, bf16
        self.heads = nn.ModuleList([nn.Linear(feature_dim, classes) for classes in class_counts])

    def forward(self, images):
        """Features (B, feature_dim) and a list of K logits (B, classes of the task)."""
        features = self.features(images)
        return features, [head(features) for head in self.heads]

    def target_logits(self, images):
        """The target task's logits alone."""
        return self.heads[0](self.features(images))

    def features(self, images):
        """Features (B, feature_dim) alone."""
        if not self.bf16:
            return self.backbone(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.backbone(images).float()


def loss_matrix(logits_list, labels, aux_weight=1.0):
    """L (B, K): unreduced cross entropy, the auxiliary columns times ``aux_weight``."""
    columns = []
    for k, logits in enumerate(logits_list):
        column = F.cross_entropy(logits, labels[:, k], reduction="none")
        columns.append(column if k == 0 else aux_weight * column)
    return torch.stack(columns, dim=1)


class PlainScheduler(nn.Module):
    """The joint schedule W_ik = softplus((A F_i + b)_k) sigmoid(u_k z_ik + c_k) softplus(t_k).

    z is L standardised over the batch, task by task. The names of the parameters are those of
    ``MonoJoint``, so that either loads the other's ``state_dict``.
    """

    def __init__(self, task_count, feature_dim):
        super().__init__()
        self.task_prior = nn.Parameter(torch.ones(task_count))  # t
        self.feature_sel = nn.Linear(feature_dim, task_count)  # A, b
        self.loss_w = nn.Parameter(torch.empty(task_count).uniform_(0, 0.05))  # u
        self.loss_b = nn.Parameter(torch.zeros(task_count))  # c
        nn.init.uniform_(self.feature_sel.weight, -0.05, 0.05)
        nn.init.zeros_(self.feature_sel.bias)

    def schedule(self, features, losses):
        """W (B, K); no gradient reaches the features or the losses."""
        features, losses = features.detach(), losses.detach()
        z = torch.zeros_like(losses)
        varies = (losses != losses[0]).any(dim=0)  # z stays 0 in a constant column, batch of one
        if varies.any():
            z = torch.where(varies, (losses - losses.mean(dim=0)) / (losses.std(dim=0) + 1e-6), z)
        feature_factor = F.softplus(self.feature_sel(features))
        loss_factor = torch.sigmoid(self.loss_w * z + self.loss_b)
        return feature_factor * loss_factor * F.softplus(self.task_prior)

    def forward(self, features, losses, to_train=True):
        """The scheduled loss; W is a constant for the lower level (``to_train``)."""
        weights = self.schedule(features, losses)
        if to_train:
            weights = weights.detach()
        return (weights * losses).sum(dim=1).mean()


def lower_step(model, scheduler, optimizer, images, labels, aux_weight=1.0):
    """One optimiser step of the task model on the scheduled loss; returns the loss."""
    features, logits_list = model(images)
    losses = loss_matrix(logits_list, labels, aux_weight)
    loss = scheduler(features, losses, to_train=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _grad_or_zeros(outputs, inputs, **options):
    grads = torch.autograd.grad(outputs, inputs, allow_unused=True, **options)
    return [
        torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)
    ]


def hypergradient(dev_loss, train_loss, phi, theta, alpha, terms=3):
    """-d/dphi <g, p>, p = v_0 + ... + v_terms, v_{j+1} = v_j - alpha H v_j, by double backward.

    g and H are the gradient and Hessian of ``train_loss`` in theta, v_0 the gradient of
    ``dev_loss``. The sum is not multiplied by alpha.
    """
    v = _grad_or_zeros(dev_loss, theta)
    g = torch.autograd.grad(train_loss, theta, create_graph=True)
    p = v
    for _ in range(terms):
        hessian_v = _grad_or_zeros(g, theta, grad_outputs=v, retain_graph=True)
        v = [v_i - alpha * h_i for v_i, h_i in zip(v, hessian_v, strict=True)]
        p = [p_i + v_i for p_i, v_i in zip(p, v, strict=True)]
    return [-grad for grad in _grad_or_zeros(g, phi, grad_outputs=p)]


def upper_step(
    model,
    scheduler,
    optimizer,
    train_images,
    train_labels,
    dev_images,
    dev_labels,
    aux_weight=1.0,
    alpha=1e-4,
    terms=3,
    max_norm=10.0,
):
    """One optimiser step of the scheduler towards a lower target loss on the development batch.

    ``dev_labels`` holds the target labels (B,). Both forward passes run in the model's current mode
    (train mode in the method's settings, so BatchNorm's running statistics move). Returns the
    hypergradient before clipping, and its norm.
    """
    theta, phi = list(model.parameters()), list(scheduler.parameters())
    dev_loss = F.cross_entropy(model.target_logits(dev_images), dev_labels)
    features, logits_list = model(train_images)
    losses = loss_matrix(logits_list, train_labels, aux_weight)
    train_loss = scheduler(features, losses, to_train=False)
    grads = hypergradient(dev_loss, train_loss, phi, theta, alpha, terms)
    for parameter, grad in zip(phi, grads, strict=True):
        parameter.grad = grad.clone()
    norm = nn.utils.clip_grad_norm_(phi, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return grads, norm


class PlainDataset(Dataset):
    """Images decoded and augmented one by one, as torchvision's examples do.

    Args:
        paths: N image files.
        labels: (N, K) int64 tensor, the target's column first.
        train: random crop and flip if true, otherwise the central crop.
        image_size: side of the crop; the shorter side is first resized to 256/224 of it.
    """

    def __init__(self, paths, labels, train, image_size=224):
        if len(paths) != len(labels):
            raise ValueError(f"{len(paths)} paths but {len(labels)} rows of labels")
        self.paths = list(paths)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if train:
            crop = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
        else:
            crop = [transforms.CenterCrop(image_size)]
        self.transform = transforms.Compose(
            [
                transforms.Resize(round(image_size * 256 / 224)),
                *crop,
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """An image (3, image_size, image_size) and its K labels."""
        with Image.open(self.paths[index]) as image:
            image = self.transform(image.convert("RGB"))
        return image, self.labels[index]
