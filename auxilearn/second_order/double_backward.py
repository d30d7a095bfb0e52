"""First and second derivatives by plain autograd, on given graphs."""

import torch


def gradients(output, inputs, **kwargs):
    """``torch.autograd.grad`` as a list, with zeros for inputs that ``output`` does not depend on.

    Inputs that do not require a gradient (frozen parameters) also get zeros.
    """
    found = [torch.zeros_like(i) for i in inputs]
    places = [place for place, i in enumerate(inputs) if i.requires_grad]
    if not output.requires_grad or not places:
        return found
    reached = torch.autograd.grad(
        output, [inputs[place] for place in places], allow_unused=True, **kwargs
    )
    for place, gradient in zip(places, reached, strict=True):
        if gradient is not None:
            found[place] = gradient
    return found


def double_backward_operators(g, params, aux_params):
    """(hvp, mixed) of the gradient ``g`` (with its graph) by differentiating it once more."""
    reached = [i for i, t in enumerate(g) if t.requires_grad]

    def product(vector, inputs):
        if not reached:
            return [torch.zeros_like(i) for i in inputs]
        inner = sum(torch.sum(g[i] * vector[i]) for i in reached)
        return gradients(inner, inputs, retain_graph=True)

    return (lambda u: product(u, params)), (lambda p: product(p, aux_params))
