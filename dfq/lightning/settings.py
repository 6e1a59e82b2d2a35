"""What a distillation can be told: the settings that :class:`~dfq.lightning.distillation.DistillationModule` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dfq.losses.token_divergence import Divergence
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share

FewBits = Annotated[int, Bound(at_least=2, at_most=8)]


@dataclass(frozen=True)
class DistillationSettings:
    """One place for the schedule, the losses, and what is done to images and student during training."""

    max_steps: PositiveInt = 400  # optimizer steps at most
    time_limit_s: PositiveFloat | None = None  # seconds until training ends; null: steps alone say when
    optimizer: Mapping[str, Any] | None = (
        None  # {name: torch.optim.SGD, lr: 0.01, ...}; null: Adam with the rates below
    )
    weight_lr: PositiveFloat = 0.01  # Adam on weights, in units of each weight's step
    bias_lr: PositiveFloat = 4e-4  # Adam on biases and other float parameters
    step_lr: PositiveFloat = 1e-3  # Adam on the quantizers' steps, relative to each step

    kl_weight: NonNegativeFloat = 1.0  # of the task's distillation loss: KL(teacher || student) of a classifier
    reverse_kl_weight: NonNegativeFloat = 0.0  # of KL(student || teacher)
    jensen_shannon_weight: NonNegativeFloat = 0.0  # of the Jensen-Shannon divergence
    logits_weight: NonNegativeFloat = 0.0  # of the squared error of logits
    temperature: PositiveFloat = 1.0  # of the three divergences
    feature_weight: NonNegativeFloat | None = None  # of the feature loss; null: 1, of language models 0
    feature_loss: Literal["relative_mse", "affinity", "qfd", "cosine"] = "relative_mse"  # qfd: teacher's, quantized
    feature_places: Literal["stages", "blocks"] = "stages"  # blocks: behind each block of the longest list of them
    feature_bits: FewBits = 4  # of the teacher's features with qfd
    box_weight: NonNegativeFloat | None = None  # of the distance of boxes where the teacher is sure; null: the task's
    task_weight: NonNegativeFloat = 0.0  # of the network's own loss on the boxes that images were made from (detectors)
    cam_weight: NonNegativeFloat = 0.0  # of the relative squared error of class activation maps (SynQ)
    label_weight: NonNegativeFloat = 0.0  # of cross-entropy to the teacher's class, easy samples only (SynQ)
    label_difficulty: Fraction = 0.5  # the teacher's 1 - p up to which a sample is easy
    divergence: Divergence = "forward"  # of text, weighted by kl_weight: between distributions over the next token
    top_k: PositiveInt = 64  # tokens that are told apart with top_k, all others being one
    chunk_tokens: PositiveInt = 1024  # of text: tokens whose logits are in memory at a time
    loss: Any = None  # of your own: {_target_: package.module.Class}, called with the outputs of student and teacher
    loss_weight: NonNegativeFloat = 1.0  # of it
    token_tau: PositiveFloat | None = None  # of text: hard tokens weigh more, TSLD's tau (10 there); null: all alike
    ntp_weight: NonNegativeFloat = 0.0  # of text: of cross-entropy to the next token of the text itself
    attention_map_weight: NonNegativeFloat = 0.0  # of text: of KL between attention maps, mean over layers
    attention_output_weight: NonNegativeFloat = 0.0  # of text: of the relative error of attention's outputs
    balance: Literal["fixed", "learned"] = "fixed"  # learned: the weights of the terms are trained too (Kendall et al.)

    intervention: Fraction = 0.0  # chance that a sample's features are the teacher's, falls to zero half way
    blocks_first: Fraction = 0.0  # share of the run in which stages are trained apart, then merged (StableKD)
    train_float: bool = True  # weights of layers that stay float too (embeddings, head); norms and biases always
    low_rank: PositiveInt | None = None  # train W + B A of this rank in place of weights, merged in the end (L4Q)
    zeroth_order: bool = False  # no backward pass: descent along random directions (ZeroQAT), by the two below
    zeroth_eps: PositiveFloat = 10.0  # two steps aside, in steps of the learning rates above
    zeroth_rate: PositiveFloat = 0.1  # a step, in the same unit
    frozen_channels: Share = 0.0  # share of output channels whose weights stay, the smallest of a layer (EfQAT)
    refreeze_steps: PositiveInt = 64  # steps after which those are chosen anew
    dampen: NonNegativeFloat = 0.0  # of the loss that holds weights near their level, reached at the end
    average: Share = 0.0  # decay of an average of weights over steps, which is what is kept; 0: the last weights

    flip: bool = True  # mirror half of the images
    shift: NonNegativeInt = 0  # pixels that images are moved by at most, edges reflected
    mixup: Fraction = 0.0  # share of batches whose images are blended with others of the batch
    jitter: NonNegativeFloat = 0.0  # deviation of the images' brightness and log contrast, drawn anew at each step
