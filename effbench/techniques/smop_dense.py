"""The dense projector of Llama-AVSR: one MLP for the tokens of audio and one for those of video.

Paper: Llama-SMoP (arXiv 2505.14336), its baseline; the form is Llama-AVSR's (arXiv 2409.12319).
Changes: the projector of the workload smop: Linear(D, H), ReLU, Linear(H, O), LayerNorm for each of the two.
Should improve: nothing: it is the reference of these arms.
Costs: 2 (D H + H O) FLOPs a token (D width of the features, H hidden, O of the language model), two MLPs of weights.
"""

from __future__ import annotations

from effbench.modules.projector_arms import DenseProjectorParams, ProjectorArm


class SmopDense(ProjectorArm):
    """One MLP for each stream."""

    name = "smop_dense"
    summary = "dense projector: one MLP for audio and one for video"
    Params = DenseProjectorParams
    kind = "dense"
