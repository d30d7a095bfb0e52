"""The hypergradient against explicit matrices, closed forms and finite differences."""

import math

import pytest
import torch

from auxilearn.implicit_diff import Hypergrad
from tests import reference

THETA_SHAPES = [(3, 2), (3,), (1, 3)]
PHI_SHAPES = [(5,), (2, 2)]


@pytest.fixture
def problem():
    """A small non-quadratic bilevel problem of flat float64 vectors."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, y, x_dev, y_dev = normal(5, 2), normal(5), normal(4, 2), normal(4)

    def predict(theta, inputs):
        w, b, out = reference.split(theta, THETA_SHAPES)
        return (torch.tanh(inputs @ w.T + b) @ out.T)[:, 0]

    def train_loss(theta, phi):
        sample, penalty = reference.split(phi, PHI_SHAPES)
        w = reference.split(theta, THETA_SHAPES)[0]
        fit = (reference.log1p_exp(sample) * (predict(theta, x) - y) ** 2).mean()
        return fit + (torch.sin(w @ penalty) ** 2).sum() * 0.3

    def dev_loss(theta):
        return ((predict(theta, x_dev) - y_dev) ** 2).mean()

    theta = normal(sum(math.prod(shape) for shape in THETA_SHAPES))
    phi = normal(sum(math.prod(shape) for shape in PHI_SHAPES))
    return train_loss, dev_loss, theta, phi


def leaves(vector, shapes):
    """The pieces of a flat vector as separate leaf tensors."""
    return [piece.clone().requires_grad_() for piece in reference.split(vector, shapes)]


def joined(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def assert_close(actual, expected, tolerance=1e-10):
    """Largest deviation within tolerance of the expected vector's largest entry."""
    expected = torch.as_tensor(expected)
    scale = max(1e-300, float(expected.abs().max()))
    assert actual.shape == expected.shape
    assert float((actual.detach() - expected).abs().max()) <= tolerance * scale


# ------------------------------------------------------------------ the reference itself


def test_reference_parts_agree_with_finite_differences(problem):
    train_loss, dev_loss, theta, phi = problem
    v, h, m = reference.dense_parts(train_loss, dev_loss, theta, phi)
    step = 1e-4

    def basis(size):
        return torch.eye(size, dtype=torch.float64) * step

    for a, e_a in enumerate(basis(len(theta))):
        fd = (dev_loss(theta + e_a) - dev_loss(theta - e_a)) / (2 * step)
        assert abs(float(fd - v[a])) < 1e-6
        for b, e_b in enumerate(basis(len(phi))):
            fd = train_loss(theta + e_a, phi + e_b) - train_loss(theta - e_a, phi + e_b)
            fd = fd - train_loss(theta + e_a, phi - e_b) + train_loss(theta - e_a, phi - e_b)
            assert abs(float(fd / (4 * step**2) - m[a, b])) < 1e-6
        for b, e_b in enumerate(basis(len(theta))):
            fd = train_loss(theta + e_a + e_b, phi) - train_loss(theta - e_a + e_b, phi)
            fd = fd - train_loss(theta + e_a - e_b, phi) + train_loss(theta - e_a - e_b, phi)
            assert abs(float(fd / (4 * step**2) - h[a, b])) < 1e-6


# ------------------------------------------------------------------ the truncated series


@pytest.mark.parametrize("terms", range(6))
@pytest.mark.parametrize("alpha", [1e-4, 0.1, 1.5])
def test_truncated_series_is_the_explicit_matrix_polynomial(problem, terms, alpha):
    train_loss, dev_loss, theta, phi = problem
    expected = reference.dense_hypergradient(train_loss, dev_loss, theta, phi, alpha, terms)
    params, aux = leaves(theta, THETA_SHAPES), leaves(phi, PHI_SHAPES)
    actual = Hypergrad(alpha, terms).grad(
        dev_loss(joined(params)), train_loss(joined(params), joined(aux)), aux, params
    )
    assert isinstance(actual, list)
    assert [grad.shape for grad in actual] == [piece.shape for piece in aux]
    assert_close(joined(actual), expected)


def test_defaults_are_a_step_of_a_tenth_and_three_terms(problem):
    train_loss, dev_loss, theta, phi = problem
    expected = reference.dense_hypergradient(train_loss, dev_loss, theta, phi, 0.1, 3)
    params, aux = leaves(theta, THETA_SHAPES), leaves(phi, PHI_SHAPES)
    actual = Hypergrad().grad(
        dev_loss(joined(params)), train_loss(joined(params), joined(aux)), aux, params
    )
    assert_close(joined(actual), expected)


def test_keywords_and_generators_give_what_lists_and_positions_give(problem):
    train_loss, dev_loss, theta, phi = problem
    params, aux = leaves(theta, THETA_SHAPES), leaves(phi, PHI_SHAPES)
    first = Hypergrad(0.3, 2).grad(
        dev_loss(joined(params)), train_loss(joined(params), joined(aux)), aux, params
    )
    second = Hypergrad(learning_rate=0.3, truncate_iter=2).grad(
        loss_val=dev_loss(joined(params)),
        loss_train=train_loss(joined(params), joined(aux)),
        aux_params=(parameter for parameter in aux),
        params=(parameter for parameter in params),
    )
    assert len(first) == len(second) == len(aux)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_but_the_result_changes(problem):
    train_loss, dev_loss, theta, phi = problem
    params, aux = leaves(theta, THETA_SHAPES), leaves(phi, PHI_SHAPES)
    Hypergrad().grad(dev_loss(joined(params)), train_loss(joined(params), joined(aux)), aux, params)
    assert torch.equal(joined(params), theta) and torch.equal(joined(aux), phi)
    assert all(tensor.grad is None for tensor in params + aux)


# ------------------------------------------------------------------ closed forms


def quadratic():
    """theta*(phi) = A^-1 B phi for the loss theta'A theta / 2 - theta'B phi."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    a = root @ root.T / 4 + 0.5 * torch.eye(4, dtype=torch.float64)
    b = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    target = torch.randn(4, dtype=torch.float64, generator=generator)
    phi = torch.randn(3, dtype=torch.float64, generator=generator)
    return a, b, target, phi


@pytest.mark.parametrize("terms", [0, 1, 3])
def test_quadratic_sign_and_scale_in_closed_form(terms):
    a, b, target, phi = quadratic()
    theta = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    phi = phi.requires_grad_()
    (actual,) = Hypergrad(0.2, terms).grad(
        0.5 * ((theta - target) ** 2).sum(),
        0.5 * theta @ a @ theta - theta @ b @ phi,
        [phi],
        [theta],
    )
    v = (theta - target).detach()
    total = sum(torch.matrix_power(torch.eye(4) - 0.2 * a, j) @ v for j in range(terms + 1))
    assert_close(actual, b.T @ total)  # the mixed derivative is -B; no factor alpha


def test_alpha_times_the_long_series_is_the_total_derivative():
    a, b, target, phi = quadratic()
    theta = torch.linalg.solve(a, b @ phi).requires_grad_()
    phi = phi.requires_grad_()
    alpha = 0.9 / float(torch.linalg.eigvalsh(a).max())
    (actual,) = Hypergrad(alpha, 400).grad(
        0.5 * ((theta - target) ** 2).sum(),
        0.5 * theta @ a @ theta - theta @ b @ phi,
        [phi],
        [theta],
    )
    phi_again = phi.detach().clone().requires_grad_()
    value = 0.5 * ((torch.linalg.solve(a, b @ phi_again) - target) ** 2).sum()
    (expected,) = torch.autograd.grad(value, phi_again)
    assert_close(alpha * actual, expected, tolerance=1e-9)


def test_finite_differences_through_a_fully_solved_problem():
    """Ridge-penalised logistic regression with softplus sample weights, solved by Newton."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    x_dev = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    y = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    y_dev = torch.tensor([1.0, 1.0, -1.0] * 2, dtype=torch.float64)
    phi = torch.randn(8, dtype=torch.float64, generator=generator)

    def train_loss(theta, logits):
        weights = reference.log1p_exp(logits)
        return (weights * reference.log1p_exp(-y * (x @ theta))).mean() + 0.1 * theta @ theta

    def dev_loss(theta):
        return reference.log1p_exp(-y_dev * (x_dev @ theta)).mean()

    def solve(logits):
        theta = torch.zeros(3, dtype=torch.float64)
        for _ in range(12):
            margin = y * (x @ theta)
            slope = torch.sigmoid(-margin)
            weights = reference.log1p_exp(logits) / len(x)
            gradient = -(weights * slope * y) @ x + 0.2 * theta
            curvature = (x.T * (weights * slope * (1 - slope))) @ x
            theta = theta - torch.linalg.solve(curvature + 0.2 * torch.eye(3), gradient)
        return theta

    step, expected = 1e-5, torch.zeros(8, dtype=torch.float64)
    for i in range(8):
        move = torch.zeros(8, dtype=torch.float64)
        move[i] = step
        expected[i] = (dev_loss(solve(phi + move)) - dev_loss(solve(phi - move))) / (2 * step)

    theta, phi, alpha = solve(phi).requires_grad_(), phi.requires_grad_(), 1.0
    (actual,) = Hypergrad(alpha, 150).grad(dev_loss(theta), train_loss(theta, phi), [phi], [theta])
    assert_close(alpha * actual, expected, tolerance=1e-7)


# ------------------------------------------------------------------ what a loss does not reach


def test_unreached_scheduler_parameter_gets_zeros(problem):
    train_loss, dev_loss, theta, phi = problem
    params, aux = leaves(theta, THETA_SHAPES), leaves(phi, PHI_SHAPES)
    stray = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    actual = Hypergrad(0.1, 3).grad(
        dev_loss(joined(params)),
        train_loss(joined(params), joined(aux)),
        [aux[0], stray, aux[1]],
        params,
    )
    expected = reference.dense_hypergradient(train_loss, dev_loss, theta, phi, 0.1, 3)
    assert torch.equal(actual[1], torch.zeros_like(stray))
    assert_close(joined([actual[0], actual[2]]), expected)


def test_scheduler_parameter_added_to_the_loss_gets_zeros(problem):
    """The loss reaches it, but its gradient in theta does not depend on it."""
    train_loss, dev_loss, theta, phi = problem
    params, aux = leaves(theta, THETA_SHAPES), leaves(phi, PHI_SHAPES)
    added = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = train_loss(joined(params), joined(aux)) + (added**3).sum()
    actual = Hypergrad(0.1, 3).grad(dev_loss(joined(params)), loss, aux + [added], params)
    expected = reference.dense_hypergradient(train_loss, dev_loss, theta, phi, 0.1, 3)
    assert torch.equal(actual[2], torch.zeros_like(added))
    assert_close(joined(actual[:2]), expected)


@pytest.mark.parametrize("missing", ["dev", "train", "both"])
def test_lower_parameters_a_loss_does_not_reach(missing):
    """Target loss without the auxiliary head, training loss without some layer."""
    shared = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    extra = torch.tensor([0.9, 0.2], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def train_loss(theta, phi_):
        loss = (torch.sin(theta[:2]) ** 2).sum() * torch.exp(phi_[0])
        return loss if missing != "dev" else loss + (theta[2:] * theta[:2]).sum() * phi_[0] ** 2

    def dev_loss(theta):
        loss = (theta[:2] ** 3).sum()
        return loss if missing != "train" else loss + (theta[2:] ** 2).sum()

    whole = torch.cat([shared, extra]).detach()
    expected = reference.dense_hypergradient(train_loss, dev_loss, whole, phi.detach(), 0.1, 3)
    train = (torch.sin(shared) ** 2).sum() * torch.exp(phi[0])
    if missing == "dev":
        train = train + (extra * shared).sum() * phi[0] ** 2
    dev = (shared**3).sum() if missing != "train" else (shared**3).sum() + (extra**2).sum()
    (actual,) = Hypergrad(0.1, 3).grad(dev, train, [phi], [shared, extra])
    assert_close(actual, expected)


def test_training_loss_linear_in_the_lower_parameters():
    """H = 0, so every term of the series is v; and the graph of the product is empty."""
    theta = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    (actual,) = Hypergrad(0.1, 3).grad((theta**2).sum(), (theta * phi).sum(), [phi], [theta])
    assert_close(actual, -4 * 2 * theta.detach())


def test_training_loss_whose_gradient_is_a_constant():
    theta = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    (actual,) = Hypergrad(0.1, 3).grad((theta**2).sum(), theta.sum() + phi.sum(), [phi], [theta])
    assert torch.equal(actual, torch.zeros_like(phi))
