"""The schedulers and combiners against formulas written out in loops."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from auxilearn import hypernet
from auxilearn.hypernet import (
    HyperNet,
    Identity,
    LinearHyperNet,
    MonoHyperNet,
    MonoJoint,
    MonoLinearHyperNet,
    MonoNonlinearHyperNet,
    Naive_hyper,
    NonlinearHyperNet,
)
from benchmarks import plain
from tests import reference

B, K, D = 7, 4, 5


def randn(*shape, seed=0):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))
    )


def randomised(module, seed=0):
    """The module in float64 with every parameter drawn anew, positive and negative alike.

    Standard deviation 1/2, which keeps arguments of softplus below 20: torch cuts its tail there.
    """
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(drawn / 2)
    return module


def mono_joint(k=K, d=D, seed=0):
    return randomised(MonoJoint(main_task=0, input_dim=k, feature_dim=d, K=k), seed)


def joint_parts(net):
    """A, b, u, c, t of a MonoJoint as arrays, by the names of its state_dict."""
    state = {name: value.detach().double().numpy() for name, value in net.state_dict().items()}
    u, c, t = (state[name].reshape(-1) for name in ("loss_w", "loss_b", "task_prior"))
    return state["feature_sel.weight"], state["feature_sel.bias"], u, c, t


def batch(rows=B, k=K, d=D, seed=0):
    """Features and positive losses."""
    return randn(rows, d, seed=seed), randn(rows, k, seed=seed + 1).exp()


def some_mask(rows=B, k=K):
    """Column 0 partly masked, column 1 with one entry, column 2 with none, the rest full."""
    mask = torch.ones(rows, k, dtype=torch.bool)
    mask[::2, 0] = False
    mask[:, 1] = False
    mask[rows // 2, 1] = True
    mask[:, 2] = False
    return mask


def assert_value(actual, expected, tolerance=1e-12):
    assert actual.shape == torch.Size([])
    assert abs(float(actual.detach()) - expected) <= tolerance * max(1.0, abs(expected))


def gradients(value, tensors):
    """Gradients with zeros where the value does not reach."""
    grads = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]


# ------------------------------------------------------------------ MonoJoint: parameters


def test_mono_joint_names_shapes_and_count():
    net = MonoJoint(0, 6, 11, K=6)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert set(shapes) == {
        "task_prior",
        "feature_sel.weight",
        "feature_sel.bias",
        "loss_w",
        "loss_b",
    }
    assert shapes["feature_sel.weight"] == (6, 11) and shapes["feature_sel.bias"] == (6,)
    for name in ("task_prior", "loss_w", "loss_b"):
        assert net.state_dict()[name].numel() == 6
    assert sum(parameter.numel() for parameter in net.parameters()) == 6 * (11 + 4)
    assert {name for name, _ in net.named_parameters()} == set(shapes)


def test_mono_joint_initial_values():
    torch.manual_seed(0)
    a, b, u, c, t = joint_parts(MonoJoint(0, 300, 64, K=300))
    assert np.all(np.abs(a) <= 0.05) and a.min() < -0.049 and a.max() > 0.049
    assert abs(a.mean()) < 1e-3 and abs(a.std() - 0.1 / np.sqrt(12)) < 1e-3
    assert u.min() >= 0 and u.max() <= 0.05 and u.min() < 0.005 and u.max() > 0.045
    assert np.all(b == 0) and np.all(c == 0) and np.all(t == 1)


def test_mono_joint_state_dict_round_trip():
    source, target = mono_joint(seed=1), mono_joint(seed=2)
    target.load_state_dict(source.state_dict())
    features, losses = batch()
    assert torch.equal(source(features, losses), target(features, losses))


def test_mono_joint_initial_state_follows_the_seed():
    torch.manual_seed(7)
    first = MonoJoint(0, 3, 4, K=3).state_dict()
    torch.manual_seed(7)
    second = MonoJoint(0, 3, 4, K=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------ MonoJoint: the formula


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("to_train", [True, False])
def test_mono_joint_formula(seed, to_train):
    net, (features, losses) = mono_joint(seed=seed), batch(seed=seed)
    w = reference.mono_joint_schedule_loops(*joint_parts(net), features.numpy(), losses.numpy())
    expected = reference.scheduled_loss_loops(w, losses.numpy())
    assert_value(net(features, losses, to_train=to_train), expected)
    schedule = net.schedule(features, losses)
    assert schedule.shape == (B, K) and bool((schedule > 0).all())
    np.testing.assert_allclose(schedule.detach().numpy(), w, rtol=1e-12, atol=0)


def test_mono_joint_formula_at_the_recipe_s_width_and_initial_state():
    torch.manual_seed(0)
    net = MonoJoint(0, 13, 64, K=13).double()
    features, losses = batch(6, 13, 64)
    w = reference.mono_joint_schedule_loops(*joint_parts(net), features.numpy(), losses.numpy())
    assert_value(net(features, losses), reference.scheduled_loss_loops(w, losses.numpy()))


def test_mono_joint_main_task_has_no_special_place_in_the_formula():
    features, losses = batch()
    nets = [MonoJoint(main, K, D, K=K).double() for main in (0, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](features, losses), nets[1](features, losses))


def test_mono_joint_permuting_the_batch_permutes_the_schedule():
    net, (features, losses) = mono_joint(), batch()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(
        net.schedule(features[order], losses[order]),
        net.schedule(features, losses)[order],
        rtol=1e-12,
        atol=0,
    )


def test_mono_joint_standardisation_forgets_shift_and_scale():
    """Up to the 1e-6 beside the standard deviation."""
    net, (features, losses) = mono_joint(), batch()
    moved = net.schedule(features, losses * 1e3 + 17)
    torch.testing.assert_close(moved, net.schedule(features, losses), rtol=1e-4, atol=0)


def test_mono_joint_float32_is_near_float64():
    net, (features, losses) = mono_joint(), batch()
    expected = float(net(features, losses).detach())
    value = net.float()(features.float(), losses.float())
    assert value.dtype == torch.float32
    assert abs(float(value.detach()) - expected) < 1e-5 * abs(expected)


@pytest.mark.parametrize("seed", range(12))
def test_mono_joint_formula_at_random_shapes_and_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, k, d = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(3))
    net, (features, losses) = mono_joint(k, d, seed), batch(rows, k, d, seed)
    mask = torch.rand(rows, k, generator=generator) < 0.6
    w = reference.mono_joint_schedule_loops(
        *joint_parts(net), features.numpy(), losses.numpy(), mask.numpy()
    )
    expected = reference.scheduled_loss_loops(w, losses.numpy(), mask.numpy())
    assert_value(net(features, losses, mask=mask), expected)


@pytest.mark.parametrize("kind", ["ordinary", "constant column", "batch of one"])
def test_plain_baseline_has_the_same_formula(kind):
    net = randomised(plain.PlainScheduler(K, D))
    features, losses = batch(rows=1 if kind == "batch of one" else B)
    losses[:, 1] = 0.1 if kind == "constant column" else losses[:, 1]
    w = reference.mono_joint_schedule_loops(*joint_parts(net), features.numpy(), losses.numpy())
    assert_value(net(features, losses), reference.scheduled_loss_loops(w, losses.numpy()))


# ------------------------------------------------------------------ MonoJoint: who gets gradients


def test_lower_level_treats_the_schedule_as_a_constant():
    net, (features, losses) = mono_joint(), batch()
    features, losses = features.requires_grad_(), losses.requires_grad_()
    value = net(features, losses, to_train=True)
    w = reference.mono_joint_schedule_loops(
        *joint_parts(net), features.detach().numpy(), losses.detach().numpy()
    )
    for grad in gradients(value, list(net.parameters())):
        assert not grad.any()
    value = net(features, losses, to_train=True)
    to_features, to_losses = gradients(value, [features, losses])
    assert not to_features.any()
    np.testing.assert_allclose(to_losses.numpy(), w / B, rtol=1e-12, atol=0)


def test_upper_level_differs_only_by_the_scheduler_s_gradient():
    net, (features, losses) = mono_joint(), batch()
    features, losses = features.requires_grad_(), losses.requires_grad_()
    lower, upper = net(features, losses, True), net(features, losses, to_train=False)
    assert torch.equal(lower, upper)
    to_features, to_losses = gradients(upper, [features, losses])
    assert not to_features.any()
    (lower_to_losses,) = gradients(lower, [losses])
    torch.testing.assert_close(to_losses, lower_to_losses, rtol=1e-14, atol=0)


def test_upper_level_gradient_by_finite_differences_of_the_loops():
    net, (features, losses) = mono_joint(), batch()
    value = net(features, losses, to_train=False)
    names = ("feature_sel.weight", "feature_sel.bias", "loss_w", "loss_b", "task_prior")
    parameters = dict(net.named_parameters())
    grads = gradients(value, [parameters[name] for name in names])
    parts = [part.copy() for part in joint_parts(net)]
    step = 1e-5

    def at(index, position, change):
        moved = [part.copy() for part in parts]
        moved[index].reshape(-1)[position] += change
        w = reference.mono_joint_schedule_loops(*moved, features.numpy(), losses.numpy())
        return reference.scheduled_loss_loops(w, losses.numpy())

    for index, grad in enumerate(grads):
        for position in range(grad.numel()):
            fd = (at(index, position, step) - at(index, position, -step)) / (2 * step)
            assert abs(float(grad.reshape(-1)[position]) - fd) < 1e-8


def test_mixed_derivative_is_the_schedule_s_derivative_against_the_losses():
    """d/dphi <dL-weighted sum, p> = d/dphi mean_i sum_k W_ik D_ik."""
    net, (features, losses) = mono_joint(), batch()
    losses.requires_grad_()
    parameters, direction = list(net.parameters()), randn(B, K, seed=9)
    (g,) = torch.autograd.grad(net(features, losses, False), losses, create_graph=True)
    mixed = gradients((g * direction).sum(), parameters)
    direct = gradients((net.schedule(features, losses) * direction).sum() / B, parameters)
    for a, b in zip(mixed, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode_holds_the_schedule_constant_too(masked):
    """A tangent in W would make the forward-over-reverse product wrong."""
    net, (features, losses) = mono_joint(), batch()
    mask = some_mask() if masked else None
    value, tangent = torch.func.jvp(
        lambda f, x: net(f, x, to_train=False, mask=mask),
        (features, losses),
        (randn(B, D, seed=3), randn(B, K, seed=4)),
    )
    leaf = losses.clone().requires_grad_()
    (grad,) = gradients(net(features, leaf, to_train=False, mask=mask), [leaf])
    expected = (grad * randn(B, K, seed=4)).sum()
    torch.testing.assert_close(tangent.detach(), expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(value.detach(), net(features, losses, mask=mask).detach())


def test_forward_over_reverse_product_is_that_of_double_backward():
    net, trunk, heads = mono_joint(), randn(3, D, seed=1), randn(D, K, seed=2)
    x, direction = randn(B, 3, seed=3), randn(3, D, seed=4)

    def loss(weight):
        features = torch.tanh(x @ weight)
        return net(features, reference.log1p_exp(features @ heads), to_train=False)

    product = torch.func.jvp(torch.func.grad(loss), (trunk,), (direction,))[1]
    trunk.requires_grad_()
    (g,) = torch.autograd.grad(loss(trunk), trunk, create_graph=True)
    (expected,) = torch.autograd.grad((g * direction).sum(), trunk)
    torch.testing.assert_close(product.detach(), expected, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ MonoJoint: open cases


def assert_finite_everywhere(net, features, losses, **options):
    features = features.detach().clone().requires_grad_()
    losses = losses.detach().clone().requires_grad_()
    for to_train in (True, False):
        value = net(features, losses, to_train=to_train, **options)
        assert torch.isfinite(value)
        if value.requires_grad:
            for grad in gradients(value, [features, losses, *net.parameters()]):
                assert torch.isfinite(grad).all()


@pytest.mark.filterwarnings("error")
def test_batch_of_one_has_z_zero():
    net, (features, losses) = mono_joint(), batch(rows=1)
    w = reference.mono_joint_schedule_loops(*joint_parts(net), features.numpy(), losses.numpy())
    assert_value(net(features, losses), reference.scheduled_loss_loops(w, losses.numpy()))
    np.testing.assert_allclose(net.schedule(features, losses).detach().numpy(), w, rtol=1e-12)
    assert_finite_everywhere(net, features, losses)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1234.567, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_column_has_z_zero(constant, dtype):
    """Exactly zero: the rounding of the mean must not be blown up by a deviation of nearly 0."""
    net, (features, losses) = mono_joint(), batch(rows=7)
    losses[:, 2] = constant
    expected = reference.mono_joint_schedule_loops(
        *joint_parts(net), features.numpy(), losses.numpy()
    )
    w = net.to(dtype).schedule(features.to(dtype), losses.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(w.detach().numpy(), expected, rtol=tolerance)
    assert_finite_everywhere(net, features.to(dtype), losses.to(dtype))


def test_whole_batch_of_equal_samples():
    net, (features, losses) = mono_joint(), batch(rows=1)
    features, losses = features.repeat(5, 1), losses.repeat(5, 1)
    single = net(features[:1], losses[:1])
    torch.testing.assert_close(net(features, losses), single, rtol=1e-12, atol=0)


# ------------------------------------------------------------------ MonoJoint: the mask


def test_full_mask_is_no_mask():
    net, (features, losses) = mono_joint(), batch()
    full = torch.ones(B, K, dtype=torch.bool)
    torch.testing.assert_close(
        net(features, losses, mask=full), net(features, losses), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(
        net.schedule(features, losses, full), net.schedule(features, losses), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("to_train", [True, False])
def test_masked_formula(to_train):
    """Partly masked, one entry, none, full: standardised and averaged over the entries left."""
    net, (features, losses), mask = mono_joint(), batch(), some_mask()
    w = reference.mono_joint_schedule_loops(
        *joint_parts(net), features.numpy(), losses.numpy(), mask.numpy()
    )
    expected = reference.scheduled_loss_loops(w, losses.numpy(), mask.numpy())
    assert_value(net(features, losses, to_train=to_train, mask=mask), expected)
    schedule = net.schedule(features, losses, mask=mask)
    assert schedule.shape == (B, K)
    np.testing.assert_allclose(schedule.detach()[mask].numpy(), w[mask.numpy()], rtol=1e-12)
    assert_finite_everywhere(net, features, losses, mask=mask)


def test_everything_masked_is_zero():
    net, (features, losses) = mono_joint(), batch()
    none = torch.zeros(B, K, dtype=torch.bool)
    assert float(net(features, losses, mask=none).detach()) == 0.0
    assert_finite_everywhere(net, features, losses, mask=none)


def test_masked_batch_of_one():
    net, (features, losses) = mono_joint(), batch(rows=1)
    mask = torch.tensor([[False, True, True, True]])
    w = reference.mono_joint_schedule_loops(
        *joint_parts(net), features.numpy(), losses.numpy(), mask.numpy()
    )
    expected = reference.scheduled_loss_loops(w, losses.numpy(), mask.numpy())
    assert_value(net(features, losses, mask=mask), expected)
    assert_finite_everywhere(net, features, losses, mask=mask)


def test_masked_column_constant_on_the_entries_left():
    net, (features, losses), mask = mono_joint(), batch(), some_mask()
    losses[mask[:, 0], 0] = 0.1
    w = reference.mono_joint_schedule_loops(
        *joint_parts(net), features.numpy(), losses.numpy(), mask.numpy()
    )
    expected = reference.scheduled_loss_loops(w, losses.numpy(), mask.numpy())
    assert_value(net(features, losses, mask=mask), expected)
    assert_finite_everywhere(net, features, losses, mask=mask)


@pytest.mark.parametrize("to_train", [True, False])
@pytest.mark.parametrize("junk", [0.0, -5.0, 1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_losses_change_not_one_bit(junk, to_train, dtype):
    net, (features, losses), mask = mono_joint().to(dtype), batch(), some_mask()
    features, losses = features.to(dtype), losses.to(dtype)

    def outcome(values):
        leaf = values.clone().requires_grad_()
        value = net(features, leaf, to_train=to_train, mask=mask)
        schedule = net.schedule(features, leaf, mask=mask)
        return [value.detach(), schedule.detach(), *gradients(value, [leaf, *net.parameters()])]

    swapped = torch.where(mask, losses, torch.full_like(losses, junk))
    before, after = outcome(losses), outcome(swapped)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not after[2][~mask].any()


def test_masked_second_derivatives_are_finite_and_unmoved_by_junk():
    """What the double backward of an upper step runs through."""
    net, (features, losses), mask = mono_joint(), batch(), some_mask()

    def outcome(values):
        leaf = values.clone().requires_grad_()
        value = net(features, leaf, to_train=False, mask=mask)
        (g,) = torch.autograd.grad(value, leaf, create_graph=True)
        return gradients((g * randn(B, K, seed=5)).sum(), list(net.parameters()))

    before = outcome(losses)
    after = outcome(torch.where(mask, losses, torch.full_like(losses, float("inf"))))
    assert all(torch.isfinite(grad).all() for grad in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_mask_gradient_reaches_theta_through_the_losses_alone():
    net, (features, losses), mask = mono_joint(), batch(), some_mask()
    w = net.schedule(features, losses, mask=mask).detach()
    losses.requires_grad_()
    (grad,) = gradients(net(features, losses, mask=mask), [losses])
    expected = torch.where(mask, w, 0.0) / mask.sum(dim=0).clamp(min=1)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------ Naive_hyper


def test_naive_table_names_shapes_and_distribution():
    torch.manual_seed(0)
    net = Naive_hyper(500, 40)
    state = net.state_dict()
    assert list(state) == ["weights.weight"] and state["weights.weight"].shape == (500, 40)
    table = state["weights.weight"]
    assert abs(float(table.mean())) < 0.03 and abs(float(table.std()) - 1) < 0.03
    assert float(table.abs().max()) > 3
    assert sum(parameter.numel() for parameter in net.parameters()) == 500 * 40


def test_naive_formula_and_gradients():
    net = Naive_hyper(data_num=9, task_num=K).double()
    table = net.state_dict()["weights.weight"].clone()
    losses, ids = batch()[1].requires_grad_(), torch.tensor([8, 0, 3, 3, 5, 1, 0])
    value = net(losses, ids)
    plain = losses.detach().numpy()
    assert_value(value, reference.naive_joint_loops(table.numpy(), plain, ids))
    assert torch.equal(value, net(losses=losses, sample_id=ids))
    (parameter,) = net.parameters()
    to_table, to_losses = gradients(value, [parameter, losses])
    expected = np.zeros((9, K))
    for i, k in itertools.product(range(B), range(K)):
        expected[ids[i], k] += reference.sigmoid(float(table[ids[i], k])) * plain[i, k] / B
    np.testing.assert_allclose(to_table.numpy(), expected, rtol=1e-12, atol=1e-15)
    w = [[reference.softplus(float(table[ids[i], k])) / B for k in range(K)] for i in range(B)]
    np.testing.assert_allclose(to_losses.numpy(), w, rtol=1e-12)


# ------------------------------------------------------------------ linear combiners


def effective(layer):
    """A layer's weight as an array, from weight_g and weight_v where it is normalised."""
    if hasattr(layer, "weight_g"):
        g, v = layer.weight_g.detach().numpy(), layer.weight_v.detach().numpy()
        return reference.normalised_weight(g, v)
    return layer.weight.detach().numpy()


def bias_of(layer):
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias.detach().numpy()


def mean_of_column(values):
    return sum(float(value) for value in values) / len(values)


def linear_loops(net, losses, main_task, skip):
    rows = reference.affine_loops(effective(net.linear), None, losses.numpy())
    value = mean_of_column([row[0] for row in rows])
    return value + (mean_of_column(losses[:, main_task]) if skip else 0.0)


@pytest.mark.parametrize("kind", [LinearHyperNet, MonoLinearHyperNet])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_linear_formula(kind, normalised, skip):
    options = {"skip_connection": skip, "weight_normalization": normalised}
    net = randomised(kind(main_task=2, input_dim=K, **options))
    losses = batch()[1]
    assert hasattr(net.linear, "weight_g") == normalised
    assert hasattr(net.linear, "weight_v") == normalised
    assert_value(net(losses), linear_loops(net, losses, 2, skip))


@pytest.mark.parametrize("kind", [LinearHyperNet, MonoLinearHyperNet])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("init", [1.0, 0.25])
def test_linear_initial_weights(kind, normalised, init):
    net = kind(0, K, init_value=init, weight_normalization=normalised).double()
    np.testing.assert_allclose(effective(net.linear), np.full((1, K), init), rtol=1e-6)


def test_linear_positional_signatures():
    losses = batch()[1]
    a = randomised(LinearHyperNet(2, K, True, 0.5, False))
    b = randomised(
        LinearHyperNet(
            main_task=2,
            input_dim=K,
            skip_connection=True,
            init_value=0.5,
            weight_normalization=False,
        )
    )
    assert torch.equal(a(losses), b(losses)) and not hasattr(a.linear, "weight_g")
    a = randomised(MonoLinearHyperNet(2, K, True, True, 0.5, False))
    b = randomised(
        MonoLinearHyperNet(
            main_task=2,
            input_dim=K,
            skip_connection=True,
            clamp_bias=True,
            init_value=0.5,
            weight_normalization=False,
        )
    )
    assert torch.equal(a(losses), b(losses)) and not hasattr(a.linear, "weight_g")


def test_linear_gradient_reaches_the_losses():
    """A combiner is a function of L, not a schedule: nothing is detached."""
    net, losses = randomised(MonoLinearHyperNet(0, K)), batch()[1].requires_grad_()
    (grad,) = gradients(net(losses), [losses])
    np.testing.assert_allclose(grad.numpy(), np.tile(effective(net.linear) / B, (B, 1)))


@pytest.mark.parametrize("clamp_bias", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_linear_clamp(clamp_bias, normalised):
    net = randomised(
        MonoLinearHyperNet(0, K, clamp_bias=clamp_bias, weight_normalization=normalised), seed=3
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.reshape(-1)[0] = -2.0
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    net.clamp()
    for name, value in net.named_parameters():
        assert torch.equal(value.detach(), before[name].clamp(min=0)), name
    if normalised:
        assert (net.linear.weight_g >= 0).all() and (net.linear.weight_v >= 0).all()


@pytest.mark.parametrize("kind", [LinearHyperNet, MonoLinearHyperNet])
@pytest.mark.parametrize("normalised", [True, False])
def test_linear_has_no_bias(kind, normalised):
    net = kind(0, K, weight_normalization=normalised)
    names = {"linear.weight_g", "linear.weight_v"} if normalised else {"linear.weight"}
    assert set(net.state_dict()) == names
    assert net.linear.bias is None


def test_linear_clamp_acts_on_the_next_value():
    net, losses = randomised(MonoLinearHyperNet(0, K, weight_normalization=False)), batch()[1]
    net.clamp()
    assert (net.linear.weight >= 0).all()
    assert_value(net(losses), linear_loops(net, losses, 0, False))


# ------------------------------------------------------------------ the MLP combiners


def layers_of(net):
    """The affine layers of the MLP in order, weight-normalised ones of whatever class included."""
    return [
        layer
        for layer in net.net.children()
        if isinstance(layer, nn.Linear) or hasattr(layer, "weight_g")
    ]


def mlp_layers(net):
    return [(effective(layer), bias_of(layer)) for layer in layers_of(net)]


@pytest.mark.parametrize("kind", [NonlinearHyperNet, MonoNonlinearHyperNet])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("hidden", [1, 3, [3], [4, 2], [10, 10, 10, 10]])
def test_mlp_formula(kind, normalised, hidden):
    options = {"hidden_sizes": hidden, "weight_normalization": normalised}
    net = randomised(kind(main_task=1, input_dim=K, **options))
    sizes = [hidden] if isinstance(hidden, int) else hidden
    widths = [(out, inside) for inside, out in itertools.pairwise([K, *sizes, 1])]
    assert [effective(layer).shape for layer in layers_of(net)] == widths
    assert bias_of(layers_of(net)[-1]) is None
    assert all(bias_of(layer) is not None for layer in layers_of(net)[:-1])
    losses = batch()[1]
    assert_value(net(losses), reference.mlp_loops(mlp_layers(net), losses.numpy(), 1))
    assert torch.equal(net(losses), net(losses, outputs=None, labels=None, data=None))


@pytest.mark.parametrize("kind", [NonlinearHyperNet, MonoNonlinearHyperNet])
@pytest.mark.parametrize("normalised", [True, False])
def test_mlp_initial_weights(kind, normalised):
    torch.manual_seed(0)
    net = kind(
        0,
        60,
        hidden_sizes=[50, 20],
        init_lower=0.2,
        init_upper=0.6,
        weight_normalization=normalised,
    )
    for layer in layers_of(net):
        weight = effective(layer)
        assert weight.min() >= 0.2 - 1e-6 and weight.max() <= 0.6 + 1e-6
        assert weight.size < 500 or (weight.min() < 0.21 and weight.max() > 0.59)
        assert weight.size < 500 or abs(weight.mean() - 0.4) < 0.02
        assert bias_of(layer) is None or not bias_of(layer).any()


def test_mlp_without_bias():
    net = NonlinearHyperNet(0, K, hidden_sizes=[3, 2], bias=False)
    assert all(bias_of(layer) is None for layer in layers_of(net))


def test_mlp_weight_normalised_layers_expose_direction_and_length():
    net = MonoNonlinearHyperNet(0, K, hidden_sizes=[3, 2], init_lower=0.1, init_upper=1.0)
    for layer in layers_of(net):
        assert any(layer.weight_g is parameter for parameter in net.parameters())
        assert any(layer.weight_v is parameter for parameter in net.parameters())


def test_mlp_positional_signature():
    names = [
        "main_task",
        "input_dim",
        "hidden_sizes",
        "nonlinearity",
        "bias",
        "dropout_rate",
        "init_upper",
        "init_lower",
        "weight_normalization",
    ]
    values = [1, K, [3, 2], None, False, 0.0, 0.5, 0.25, False]
    for kind in (NonlinearHyperNet, MonoNonlinearHyperNet):
        net, same = kind(*values), kind(**dict(zip(names, values, strict=True)))
        for candidate in (net, same):
            assert not hasattr(layers_of(candidate)[0], "weight_g")
            for layer in layers_of(candidate):
                assert layer.weight.min() >= 0.25 and layer.weight.max() <= 0.5
        same.load_state_dict(net.state_dict())
        losses = batch()[1].float()
        assert torch.equal(net(losses), same(losses))


def test_mlp_dropout_in_train_mode_only():
    net = randomised(NonlinearHyperNet(0, K, hidden_sizes=[30, 30], dropout_rate=0.5))
    losses = batch()[1]
    net.train()
    values = {float(net(losses).detach()) for _ in range(5)}
    assert len(values) > 1
    net.eval()
    assert_value(net(losses), reference.mlp_loops(mlp_layers(net), losses.numpy(), 0))


def test_mlp_given_nonlinearity():
    net = randomised(NonlinearHyperNet(0, K, hidden_sizes=3, nonlinearity=nn.Tanh()))
    losses = batch()[1]
    (first, bias), (last, _) = mlp_layers(net)
    hidden = np.tanh(losses.numpy() @ first.T + bias)
    expected = (hidden @ last.T).mean() + losses.numpy()[:, 0].mean()
    assert_value(net(losses), expected)


@pytest.mark.parametrize("normalised", [True, False])
def test_mlp_clamp(normalised):
    net = randomised(
        MonoNonlinearHyperNet(0, K, hidden_sizes=[3, 2], weight_normalization=normalised), seed=5
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.reshape(-1)[0] = -2.0
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    net.clamp()
    for name, value in net.named_parameters():
        expected = before[name] if "bias" in name else before[name].clamp(min=0)
        assert torch.equal(value.detach(), expected), name


@pytest.mark.parametrize("normalised", [True, False])
def test_clamped_mlp_is_monotone_in_every_loss(normalised):
    options = {"hidden_sizes": [6, 6], "weight_normalization": normalised}
    net = randomised(MonoNonlinearHyperNet(0, K, **options), seed=2)
    net.clamp()
    losses = batch()[1].requires_grad_()
    (grad,) = gradients(net(losses), [losses])
    assert torch.isfinite(grad).all() and (grad >= 0).all()
    assert (grad[:, 0] >= 1 / B - 1e-15).all()


# ------------------------------------------------------------------ the family


def one_of_each():
    return [
        Identity(0, K),
        LinearHyperNet(0, K),
        MonoLinearHyperNet(0, K),
        NonlinearHyperNet(0, K),
        MonoNonlinearHyperNet(0, K),
        MonoJoint(0, K, D, K=K),
    ]


def test_every_combiner_is_a_hypernet_and_gives_its_weights():
    for net in one_of_each():
        assert isinstance(net, HyperNet) and isinstance(net, nn.Module)
        assert callable(net.get_weights)
        net.get_weights()


def test_the_linear_combiner_s_weights_are_its_weights():
    for normalised in (True, False):
        net = LinearHyperNet(0, K, init_value=0.75, weight_normalization=normalised)
        weights = net.get_weights()
        weights = list(weights) if isinstance(weights, (list, tuple)) else [weights]
        numbers = torch.cat([torch.as_tensor(w).detach().reshape(-1).float() for w in weights])
        assert int(((numbers - 0.75).abs() < 1e-6).sum()) == K


def test_every_scheduler_can_be_clamped_and_only_the_monotone_ones_change():
    for net in [*one_of_each(), Naive_hyper(B, K)]:
        net = randomised(net)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        net.clamp()
        moved = any(not torch.equal(before[n], v) for n, v in net.state_dict().items())
        assert moved == isinstance(net, (MonoLinearHyperNet, MonoNonlinearHyperNet))


def test_the_monotone_combiners_are_of_the_family():
    assert issubclass(MonoLinearHyperNet, MonoHyperNet)
    assert issubclass(MonoNonlinearHyperNet, MonoHyperNet)
    assert issubclass(MonoHyperNet, HyperNet)
    assert not issubclass(NonlinearHyperNet, MonoHyperNet)


@pytest.mark.parametrize("junk", [7.0, float("inf"), float("nan")])
@pytest.mark.parametrize("index", range(6))
def test_masked_losses_change_not_one_bit_of_any_other_scheduler(index, junk):
    net = [*one_of_each()[:5], Naive_hyper(B, K)][index]
    net, losses, mask = randomised(net), batch()[1], some_mask()
    extra = (torch.arange(B),) if isinstance(net, Naive_hyper) else ()

    def outcome(values):
        leaf = values.clone().requires_grad_()
        value = net(leaf, *extra, mask=mask)
        return [value.detach(), *gradients(value, [leaf, *net.parameters()])]

    before = outcome(losses)
    after = outcome(torch.where(mask, losses, torch.full_like(losses, junk)))
    assert all(torch.isfinite(tensor).all() for tensor in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_masked_naive_formula():
    net, losses, mask = Naive_hyper(B, K).double(), batch()[1], some_mask()
    table = net.state_dict()["weights.weight"]
    w = [[reference.softplus(float(table[i, k])) for k in range(K)] for i in range(B)]
    expected = reference.scheduled_loss_loops(w, losses.numpy(), mask.numpy())
    assert_value(net(losses, torch.arange(B), mask=mask), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "MonoJoint": "main_task input_dim feature_dim hidden_sizes=1 nonlinearity=None bias=True "
        "dropout_rate=0.0 weight_normalization=True K=2 init_lower=0.0 init_upper=1.0",
        "MonoNonlinearHyperNet": "main_task input_dim hidden_sizes=1 nonlinearity=None bias=True "
        "dropout_rate=0.0 init_upper=None init_lower=None weight_normalization=True",
        "NonlinearHyperNet": "main_task input_dim hidden_sizes=1 nonlinearity=None bias=True "
        "dropout_rate=0.0 init_upper=None init_lower=None weight_normalization=True",
        "LinearHyperNet": "main_task input_dim skip_connection=False init_value=1.0 "
        "weight_normalization=True",
        "MonoLinearHyperNet": "main_task input_dim skip_connection=False clamp_bias=False "
        "init_value=1.0 weight_normalization=True",
        "Naive_hyper": "data_num task_num",
    }.items(),
)
def test_constructor_signatures_that_user_code_relies_on(name, expected):
    parameters = list(inspect.signature(getattr(hypernet, name)).parameters.values())
    found = [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in parameters
    ]
    wanted = expected.split()
    assert found[: len(wanted)] == wanted
    assert all("=" in extra for extra in found[len(wanted) :])


def test_mono_joint_positional_signature():
    torch.manual_seed(0)
    net = MonoJoint(0, K, D, 1, None, True, 0.0, True, K, 0.0, 1.0)
    torch.manual_seed(0)
    same = MonoJoint(
        main_task=0,
        input_dim=K,
        feature_dim=D,
        hidden_sizes=1,
        nonlinearity=None,
        bias=True,
        dropout_rate=0.0,
        weight_normalization=True,
        K=K,
        init_lower=0.0,
        init_upper=1.0,
    )
    features, losses = (tensor.float() for tensor in batch())
    value = net(features, losses, True)
    assert torch.equal(value, same(features=features, losses=losses, to_train=True))
