"""Learning preferences: the sequences of answers, the losses of DPO, IPO, KTO and ORPO, and the reference model.

`sequences` reads answers with their prompts, `losses` defines the losses, and `reference` computes the
log-probabilities of the initial model, which DPO, IPO and KTO compare with.
"""

from zeta_core.objective.preference.losses import PreferenceLoss, preference_loss
from zeta_core.objective.preference.reference import compute_references, prepare_references
from zeta_core.objective.preference.sequences import AnswerSequences, LabeledAnswers, Pairs, preference_sequences

__all__ = [
    "AnswerSequences",
    "LabeledAnswers",
    "Pairs",
    "PreferenceLoss",
    "compute_references",
    "preference_loss",
    "preference_sequences",
    "prepare_references",
]
