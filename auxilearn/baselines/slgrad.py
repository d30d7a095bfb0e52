"""SLGrad: Grégoire, Chaudhary and Verboven, "Sample-Level Weighting for Multi-Task Learning with
Auxiliary Tasks", 2023.

Every sample of every task is weighted by how far a step along its gradient lowers the target's loss
on held-out data. With v that loss's gradient at theta, and D_ik = <gradient of L_ik, v>,

    w_ik = max(0, D_ik) / sum_jl max(0, D_jl),  0 where all are 0

over all samples and tasks of the batch. The paper takes a backward pass per sample and task; here
all D_ik come from one forward-mode pass.
"""

from auxilearn.baselines.l2rw import LearningToReweight


class SampleLevelGradients(LearningToReweight):
    """Weights of all samples and tasks, found anew in every lower step; nothing is learned.

    What is left open, and chosen here: v is taken at theta, not after a step, and over all
    parameters, the target's head among them; the metric on the held-out data is the target's mean
    loss on the development batches; D is of raw losses, and a factor on auxiliary losses multiplies
    the weighted ones; the weights' sum is 1 over the entries that have a loss, as in ``l2rw``,
    whose extension to tasks this is: W_ik = N_k w_ik, N_k the samples with a loss under task k.
    Equal weights sum to K in that scale. Adam does not feel the difference, but for its weight
    decay.
    """

    def total(self, sums):
        return sums.sum()

    def kept(self, weights):
        return weights
