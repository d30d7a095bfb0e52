"""First and second derivatives by plain autograd, on given graphs."""

import torch


def gradients(outputs, inputs, directions=None, **kwargs):
    """``torch.autograd.grad`` as a list, with zeros for inputs that no output depends on.

    ``outputs``: a scalar, or a list of tensors with ``directions``, a list shaped like it. Outputs
    and inputs that do not require a gradient (frozen parameters) count as constants.
    """
    return zeros_for_none(gradients_or_none(outputs, inputs, directions, **kwargs), inputs)


def gradients_or_none(outputs, inputs, directions=None, **kwargs):
    """``gradients``, with None for inputs that no output depends on."""
    found = [None] * len(inputs)
    places = [place for place, i in enumerate(inputs) if i.requires_grad]
    if directions is None:
        outputs, directions = [outputs], [None]
    reached = [(o, d) for o, d in zip(outputs, directions, strict=True) if o.requires_grad]
    if reached and places:
        outputs, directions = zip(*reached, strict=True)
        of_places = torch.autograd.grad(
            outputs, [inputs[place] for place in places], directions, allow_unused=True, **kwargs
        )
        for place, gradient in zip(places, of_places, strict=True):
            found[place] = gradient
    return found


def zeros_for_none(gradients, inputs):
    return [torch.zeros_like(i) if g is None else g for g, i in zip(gradients, inputs, strict=True)]


def double_backward_operators(g, params, aux_params):
    """(hvp, mixed) of the gradient ``g`` (with its graph) by differentiating it once more."""

    def product(vector, inputs):
        return gradients(g, inputs, vector, retain_graph=True)

    return (lambda u: product(u, params)), (lambda p: product(p, aux_params))
