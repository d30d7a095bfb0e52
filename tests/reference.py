"""Plain reference formulas, written from the specification alone and independent of the package.

Two kinds. Values are computed by explicit Python loops over floats (``*_loops``). Derivatives come
from dense matrices: a loss is a function of two flat float64 vectors, ``theta`` (lower level) and
``phi`` (upper level), its Hessian and mixed derivative are formed in full, and the Neumann series
is an explicit matrix polynomial. Nothing here imports the package under test.
"""

import math

import numpy as np
import torch
from torch.autograd.functional import hessian, jacobian

# ------------------------------------------------------------------ values, by explicit loops


def softplus(x):
    """log(1 + exp(x)) of a float."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    """1 / (1 + exp(-x)) of a float."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def standardise_loops(losses, mask=None):
    """z of a (B, K) array: column by column over the masked-in entries, 0 where undefined."""
    losses = np.asarray(losses, dtype=np.float64)
    rows, columns = losses.shape
    z = np.zeros((rows, columns))
    for k in range(columns):
        inside = [i for i in range(rows) if mask is None or mask[i][k]]
        if len(inside) < 2:
            continue
        values = [float(losses[i, k]) for i in inside]
        if min(values) == max(values):
            continue
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        for i in inside:
            z[i, k] = (float(losses[i, k]) - mean) / (math.sqrt(variance) + 1e-6)
    return z


def mono_joint_schedule_loops(a, b, u, c, t, features, losses, mask=None):
    """W (B, K) of MonoJoint: feature factor * label (loss) factor * task factor."""
    features = np.asarray(features, dtype=np.float64)
    z = standardise_loops(losses, mask)
    rows, columns = z.shape
    weights = np.zeros((rows, columns))
    for i in range(rows):
        for k in range(columns):
            score = float(b[k])
            for j in range(features.shape[1]):
                score += float(a[k][j]) * features[i, j]
            weights[i, k] = (
                softplus(score)
                * sigmoid(float(u[k]) * z[i, k] + float(c[k]))
                * softplus(float(t[k]))
            )
    return weights


def scheduled_loss_loops(weights, losses, mask=None):
    """Sum over tasks of the mean over (masked-in) samples of W * L."""
    weights, losses = np.asarray(weights), np.asarray(losses)
    rows, columns = losses.shape
    total = 0.0
    for k in range(columns):
        inside = [i for i in range(rows) if mask is None or mask[i][k]]
        column = math.fsum(float(weights[i, k]) * float(losses[i, k]) for i in inside)
        total += column / (rows if mask is None else max(1, len(inside)))
    return total


def naive_joint_loops(table, losses, sample_id):
    """sum_k mean_i softplus(table[id_i, k]) L_ik."""
    rows, columns = np.shape(losses)
    total = 0.0
    for k in range(columns):
        column = 0.0
        for i in range(rows):
            column += softplus(float(table[int(sample_id[i])][k])) * float(losses[i][k])
        total += column / rows
    return total


def affine_loops(weight, bias, rows):
    """One affine layer on a list of lists."""
    out = []
    for row in rows:
        values = []
        for o in range(len(weight)):
            value = 0.0 if bias is None else float(bias[o])
            for j in range(len(row)):
                value += float(weight[o][j]) * float(row[j])
            values.append(value)
        out.append(values)
    return out


def mlp_loops(layers, losses, main_task):
    """net(L).mean() + L[:, main].mean(); layers is [(weight, bias or None), ...]."""
    rows = [[float(value) for value in row] for row in losses]
    main = sum(row[main_task] for row in rows) / len(rows)
    for weight, bias in layers[:-1]:
        rows = [[softplus(value) for value in row] for row in affine_loops(weight, bias, rows)]
    rows = affine_loops(*layers[-1], rows)
    return sum(row[0] for row in rows) / len(rows) + main


def normalised_weight(g, v):
    """g * v / |v|, the norm over the directions along which g does not vary."""
    g, v = np.asarray(g, dtype=np.float64), np.asarray(v, dtype=np.float64)
    g = g.reshape(g.shape + (1,) * (v.ndim - g.ndim))
    axes = tuple(axis for axis in range(v.ndim) if g.shape[axis] == 1)
    if not axes:
        axes = (1,)
    return g * v / np.sqrt((v**2).sum(axis=axes, keepdims=True))


# ------------------------------------------------------------------ the hypergradient, dense


def dense_parts(train_loss, dev_loss, theta, phi):
    """v (n), H (n, n) and the mixed derivative M = dg/dphi (n, m), each formed in full."""
    theta, phi = theta.detach(), phi.detach()
    v = jacobian(dev_loss, theta)
    h = hessian(lambda th: train_loss(th, phi), theta, vectorize=True)

    def gradient_in_theta(ph):
        th = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(train_loss(th, ph), th, create_graph=True)
        return g

    m = jacobian(gradient_in_theta, phi, vectorize=True)
    return v, h, m


def dense_hypergradient(train_loss, dev_loss, theta, phi, alpha, terms):
    """- M^T sum_{j=0..terms} (I - alpha H)^j v, as explicit matrices."""
    v, h, m = dense_parts(train_loss, dev_loss, theta, phi)
    identity = torch.eye(len(v), dtype=v.dtype)
    power, polynomial = identity, identity.clone()
    for _ in range(terms):
        power = power @ (identity - alpha * h)
        polynomial = polynomial + power
    return -(m.T @ (polynomial @ v))


# ------------------------------------------------------------------ optimisers, from scratch


class Adam:
    """Adam with L2 decay added to the gradient, on one flat vector."""

    def __init__(self, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.count, self.first, self.second = 0, 0.0, 0.0

    def step(self, x, gradient):
        gradient = gradient + self.weight_decay * x
        self.count += 1
        beta1, beta2 = self.betas
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        first = self.first / (1 - beta1**self.count)
        second = self.second / (1 - beta2**self.count)
        return x - self.lr * first / (second.sqrt() + self.eps)


class MomentumSGD:
    """Gradient descent with heavy-ball momentum and L2 decay, on one flat vector."""

    def __init__(self, lr, momentum=0.9, weight_decay=0.0):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity = 0.0

    def step(self, x, gradient):
        self.velocity = self.momentum * self.velocity + gradient + self.weight_decay * x
        return x - self.lr * self.velocity


def clip_norm(gradient, max_norm):
    """The vector scaled back to max_norm where it is longer."""
    norm = gradient.norm()
    return gradient * (max_norm / norm) if norm > max_norm else gradient


# ------------------------------------------------------------------ flat vectors


def flat(tensors):
    """One float64 vector of all tensors, in order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).clone()


def split(vector, shapes):
    """The inverse of flat."""
    pieces, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        pieces.append(vector[start : start + size].reshape(shape))
        start += size
    assert start == len(vector)
    return pieces


# ------------------------------------------------------------------ losses of flat vectors


def cross_entropy_column(logits, labels):
    """Unreduced cross entropy (B,) written out: log sum exp minus the label's logit."""
    shifted = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_sum = shifted.exp().sum(dim=1).log()
    return log_sum - shifted[torch.arange(len(labels)), labels]


def tanh_network(theta, x, input_dim, hidden, class_counts):
    """Features (B, hidden) and logits of a one-layer tanh trunk with one affine head per task."""
    shapes = [(hidden, input_dim), (hidden,)]
    for classes in class_counts:
        shapes += [(classes, hidden), (classes,)]
    w, b, *heads = split(theta, shapes)
    features = torch.tanh(x @ w.T + b)
    logits = [features @ heads[2 * k].T + heads[2 * k + 1] for k in range(len(class_counts))]
    return features, logits


def standardise(losses):
    """z (B, K) for columns that vary."""
    mean = losses.sum(dim=0) / len(losses)
    variance = ((losses - mean) ** 2).sum(dim=0) / (len(losses) - 1)
    return (losses - mean) / (variance.sqrt() + 1e-6)


def log1p_exp(x):
    """softplus of a tensor."""
    return torch.logaddexp(x, torch.zeros_like(x))


def mono_joint_weights(phi, features, z):
    """W (B, K) of flat phi = (A, b, u, c, t), for given features and standardised losses."""
    k, d = z.shape[1], features.shape[1]
    a, b, u, c, t = split(phi, [(k, d), (k,), (k,), (k,), (k,)])
    return log1p_exp(features @ a.T + b) / (1 + torch.exp(-(u * z + c))) * log1p_exp(t)


def weight_normalised(g, v):
    """g * v / |v|, row by row."""
    return g.reshape(-1, 1) * v / (v**2).sum(dim=1, keepdim=True).sqrt()


# ------------------------------------------------------------------ the target's odds


class Odds:
    """w_T : w_A of the stable form from all upper steps so far, in NumPy.

    The mean over steps weighs the i-th by i (i + 1) ... (i + late - 1), which is about i^late.
    """

    def __init__(self, start, *, prior, late, fastest, limit):
        self.start = self.odds = min(max(start, 1 / limit), limit)
        self.prior, self.late, self.fastest, self.limit = prior, late, fastest, limit
        self.seen = []  # (c, N) of unit weights, in the unit of the step at the start's weights

    def observe(self, slopes, gram):
        """Returns the new odds."""
        weight = np.array([self.odds, 1.0]) / (self.odds + 1)
        c, n = np.asarray(slopes) / weight, np.asarray(gram) / np.outer(weight, weight)
        with np.errstate(invalid="ignore", divide="ignore"):
            size = np.sqrt(np.array([self.start, 1]) @ n @ np.array([self.start, 1]))
            c, n = c / size, n / size**2
        if not (np.isfinite(c).all() and np.isfinite(n).all()):
            return self.odds
        self.seen.append((c, n))
        steps = len(self.seen)
        weights = [math.prod(range(i, i + self.late)) for i in range(1, steps + 1)]
        c = sum(w * one for w, (one, _) in zip(weights, self.seen, strict=True)) / sum(weights)
        n = sum(w * one for w, (_, one) in zip(weights, self.seen, strict=True)) / sum(weights)
        of_start = n @ np.array([self.start, 1.0])
        of_start *= np.abs(c).sum() / np.abs(of_start).sum()
        worth = steps * min(self.start, 1)  # in upper steps with all labels
        c = (worth * c + self.prior * of_start) / (worth + self.prior)
        target, rest = np.maximum(np.linalg.solve(n, c), 0)
        if target or rest:
            solved = self.limit if not rest else target / rest
            solved = min(max(solved, 1 / self.limit), self.limit)
            change = math.log(solved / self.odds)
            self.odds *= math.exp(min(max(change, -self.fastest), self.fastest))
        return self.odds
