from auxilearn.bilevel import Bilevel as Bilevel
from auxilearn.hypernet import HyperNet as HyperNet
from auxilearn.hypernet import MonoJoint as MonoJoint
from auxilearn.hypernet import Naive_hyper as Naive_hyper
from auxilearn.hypernet import scheduled_loss as scheduled_loss
from auxilearn.implicit_diff import identity as identity
from auxilearn.implicit_diff import neumann as neumann
from auxilearn.implicit_diff import preconditioned as preconditioned
from auxilearn.losses import TaskLosses as TaskLosses
from auxilearn.losses import fill_missing as fill_missing
from auxilearn.methods import register as register
from auxilearn.optim import adam_scale as adam_scale
from auxilearn.solvers import conjugate_gradient as conjugate_gradient
from auxilearn.solvers import exact as exact
from auxilearn.stable import StableJoint as StableJoint
from auxilearn.stable import fit_stable as fit_stable
from auxilearn.weights import schedule_weights as schedule_weights

__version__: str
