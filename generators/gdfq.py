"""GDFQ: a network trained once to make images of every class, then drawn from; Qimera's images between classes.

Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020, arXiv 2003.03603. ::

    network = argmin  E[ bn_loss(images) + class_weight * cross_entropy(teacher(images), labels) ]
    images = network(noise, embedding[labels])

Noise and labels are new in every step, so what is learned is a source of images, not a set: all batches of a dataset
are drawn from one network, and making more costs one forward. The label's embedding scales and shifts the channels
behind every norm of the network (conditional batch norm, the paper's choice for ImageNet), at any size of image.

``superposed``: that share of the images lies between classes, where the boundaries are that a student has to keep
(Qimera, Choi et al., NeurIPS 2021, arXiv 2111.02625: boundary supporting samples from superposed embeddings). Its
embedding is a mixture of those of ``num_superposed`` classes, and the same mixture is the target of the cross-entropy::

    embedding = sum_k shares_k * embedding[label_k],   shares = softmax(p),   p ~ N(0, 1)

``embedding: classifier`` starts the embeddings from the rows of the teacher's last layer, which tell what classes have
in common; the linear layers between embedding and scale or shift stand for Qimera's disentanglement mapping.

The network is stored with the dataset, and ``algorithm=distillation algorithm.fresh_share=0.5`` draws half of every
batch anew from it, in the adversarial variants from one that is trained against the student
(:mod:`dfq.lightning.fresh`).

Differences from the papers: no student takes part while the network is trained for a dataset, neither in turns with it
nor against it: it is done before the first image is stored; the batch-norm loss in units of the running
deviation, averaged over layers (:mod:`dfq.losses.batch_norm_statistics`); conditional batch norm at all sizes, in place
of the product of noise and embedding; classifier rows centered over classes, which a softmax does not see, and scaled
to variance 1; the layers of :class:`dfq.generators._network.GeneratorNetwork`; the step falls to zero along a cosine;
the network's norms take their statistics from images of the finished network; pixels stay legal; SynQ's ``low_pass``
as an option (Kim et al., ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from dfq.errors import UserError
from dfq.generators._base import Generator, Source
from dfq.generators._needs import check_needs
from dfq.generators._network import GeneratorNetwork
from dfq.generators._optimization import (
    Penalty,
    cosine,
    finish,
    optimize,
    picture_statistics,
    task_and_classes,
    together,
)
from dfq.generators._precision import Precision
from dfq.generators._statistics import batch_norm_distances
from dfq.progress import Advance, progress_bar
from dfq.settings import Bound, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

STATISTICS_BATCHES = 10  # from which the finished network's norms take their statistics


@dataclass(frozen=True)
class GDFQ(Generator):
    """Gradient descent on a network, once for all batches of a dataset."""

    iterations: PositiveInt = 1000  # steps of the network, in all
    train_batch_size: Annotated[int, Bound(at_least=2)] = 64  # images in each of them
    learning_rate: PositiveFloat = 0.005  # first step of Adam; it falls to zero along a cosine
    num_latents: PositiveInt = 256  # random numbers that an image is made from; above 64 pixels: each 32x32 of it
    num_channels: Annotated[int, Bound(at_least=4)] = 16  # of the network's widest layers
    class_weight: NonNegativeFloat = 0.1  # weight of the classes; the mean over batch norms has 1
    superposed: Fraction = 0.0  # share of images between classes (Qimera)
    num_superposed: Annotated[int, Bound(at_least=2)] = 2  # classes that such an image lies between
    embedding: Literal["random", "classifier"] = "random"  # first one of a class: noise, or its row of the last layer
    clip: bool = True  # keep pixels between black and white
    low_pass: NonNegativeFloat = 0.0  # cutoff of a filter on the finished images, in cycles per pixel; 0: none
    precision: Precision = "float32"  # of the network while images are made; auto: the faster one, measured, is kept
    needs_batch_norm: ClassVar[bool] = True

    def prepare(self, teacher: Teacher, rng: torch.Generator) -> ClassSource:
        check_needs(teacher, self, "gdfq", "matches batch-norm statistics")
        with progress_bar("train gdfq's network", self.iterations, "steps") as advance:
            return self.train(teacher, rng, lambda share, note="": advance(share * self.iterations))

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        """A batch from a network of its own, for callers that do not prepare."""
        check_needs(teacher, self, "gdfq", "matches batch-norm statistics")
        source = self.train(teacher, rng, lambda share, note="": advance(share * num_samples))
        return source.sample(teacher, num_samples, rng, advance)

    def train(self, teacher: Teacher, rng: torch.Generator, advance: Advance) -> ClassSource:
        """The trained network; ``advance`` is called with the share of the work just done."""
        network = self.start(teacher, rng)
        schedule = cosine(torch.optim.Adam(network.parameters(), lr=self.learning_rate), self.iterations)
        size = self.train_batch_size
        self.descend(teacher, network, schedule, self.iterations, size, rng, lambda n, note="": advance(n / size))
        _settle(network, size, rng)
        return ClassSource(self, network.requires_grad_(False))

    def restored(self, teacher: Teacher, weights: Mapping[str, Tensor]) -> ClassSource:
        network = self.start(teacher, torch.Generator())
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:  # other names or shapes
            raise UserError(
                f"got a stored network of gdfq that does not fit ({str(error).splitlines()[-1].strip()})",
                do="generate the dataset into a new folder",
            ) from error
        return ClassSource(self, network.eval().requires_grad_(False))

    def start(self, teacher: Teacher, rng: torch.Generator) -> ClassNetwork:
        """A network that has learned nothing."""
        spec = teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        _, num_classes = task_and_classes(teacher)
        if self.superposed > 0 and self.num_superposed > num_classes:
            raise UserError(
                f"got generator.num_superposed={self.num_superposed} for {num_classes} classes",
                f"from 2 to {num_classes}",
            )
        if self.embedding == "classifier":
            embedding = classifier_rows(teacher, num_classes)
        else:
            embedding = torch.randn(num_classes, self.num_latents, generator=rng)
        layers = GeneratorNetwork(spec.size, self.num_latents, self.num_channels, rng, embedding.shape[1])
        network = ClassNetwork(layers, embedding, spec, self.superposed, self.num_superposed, self.clip)
        return network.to(teacher.device)

    def descend(
        self,
        teacher: Teacher,
        network: ClassNetwork,
        schedule: LRScheduler,
        iterations: int,
        num_samples: int,
        rng: torch.Generator,
        advance: Advance = lambda amount, note="": None,
        penalty: Penalty | None = None,
    ) -> None:
        """Steps of ``network``, each on ``num_samples`` new images; ``penalty`` is added to its loss."""
        task = task_of(teacher)
        targets = torch.empty(0)

        def make() -> Tensor:
            nonlocal targets
            images, targets = draw(network, num_samples, rng)
            return images

        def class_loss(images: Tensor, outputs: object) -> Tensor:
            logits = task.raw_outputs(lambda _: outputs, images)
            return self.class_weight * task.synthesis_loss(logits, targets)

        distances, losses = batch_norm_distances(teacher), together(class_loss, penalty)
        optimize(teacher, distances, make, [schedule], iterations, advance, losses, precision=self.precision)


@dataclass(frozen=True)
class ClassSource(Source):
    """A trained network, as what images are asked of."""

    generator: GDFQ
    network: ClassNetwork

    @torch.no_grad()
    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        images, _ = draw(self.network, num_samples, rng)
        return finish(images, self.network.spec, self.generator.low_pass, self.network.clip)

    def descend(
        self, teacher: Teacher, schedule: LRScheduler, num_samples: int, rng: torch.Generator, penalty: Penalty
    ) -> None:
        """The norms keep the statistics that they have, so that an image goes on to depend on itself alone."""
        self.network.requires_grad_(True)
        self.generator.descend(teacher, self.network, schedule, 1, num_samples, rng, penalty=penalty)
        self.network.requires_grad_(False)


class ClassNetwork(nn.Module):
    """Latents and mixtures of classes to images as the teacher takes them; and what is drawn from it, :func:`draw`.

    Args:
        layers: with as many conditions as an embedding has numbers.
        embedding: [num_classes, num_conditions], to start from.
        superposed, num_superposed, clip: see :class:`GDFQ`.
    """

    mean: Tensor
    std: Tensor
    black: Tensor
    white: Tensor

    def __init__(
        self,
        layers: GeneratorNetwork,
        embedding: Tensor,
        spec: InputSpec,
        superposed: float,
        num_superposed: int,
        clip: bool,
    ):
        super().__init__()
        self.layers, self.embedding = layers, nn.Parameter(embedding)
        self.spec, self.superposed, self.num_superposed, self.clip = spec, superposed, num_superposed, clip
        for name, values in zip(("mean", "std"), picture_statistics(spec), strict=True):
            self.register_buffer(name, values.view(-1, 1, 1))
        for name, values in zip(("black", "white"), spec.limits(self.embedding.device), strict=True):
            self.register_buffer(name, values, persistent=False)  # made anew, each step would wait for the device

    def forward(self, latents: Tensor, mixtures: Tensor) -> Tensor:
        """[N, *latent_shape] and [N, num_classes] to images [N, C, H, W]."""
        images = self.layers(latents, mixtures @ self.embedding) * self.std + self.mean
        images = images.contiguous(memory_format=torch.channels_last)
        return images.clamp(self.black, self.white) if self.clip else images


def draw(network: ClassNetwork, num_samples: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """New images [N, C, H, W], with the gradient of the network, and the classes [N, num_classes] they were meant for.

    From a trained network as many as one likes; an image depends on its own random numbers alone.

    Args:
        rng: random numbers on the CPU.
    """
    device = network.embedding.device
    at_once = device.type == "cuda"  # else each step would wait for the copy
    mixtures = class_mixtures(num_samples, len(network.embedding), rng, network.superposed, network.num_superposed)
    mixtures = mixtures.to(device, non_blocking=at_once)
    latents = torch.randn(num_samples, *network.layers.latent_shape, generator=rng).to(device, non_blocking=at_once)
    return network(latents, mixtures), mixtures


def class_mixtures(
    num_samples: int, num_classes: int, rng: torch.Generator, superposed: float = 0.0, num_superposed: int = 2
) -> Tensor:
    """Shares of the classes [N, num_classes]: one class, or (``superposed`` of the rows) ``num_superposed`` of them.

    Balanced: each class is the single or first one of as many rows as any other; which get one more, is drawn.
    """
    labels = torch.randperm(num_classes, generator=rng)[torch.arange(num_samples) % num_classes]
    single = F.one_hot(labels, num_classes).float()
    if superposed == 0:
        return single
    order = torch.rand(num_samples, num_classes, generator=rng) + single  # the own class before all others
    classes = order.topk(num_superposed, dim=1).indices
    shares = torch.randn(num_samples, num_superposed, generator=rng).softmax(1)
    mixed = torch.rand(num_samples, 1, generator=rng) < superposed
    return torch.where(mixed, torch.zeros_like(single).scatter(1, classes, shares), single)


def classifier_rows(teacher: Teacher, num_classes: int) -> Tensor:
    """The weights of the last layer with an output for every class [num_classes, D], of mean 0 and variance 1."""
    for call in reversed(teacher.dataflow.calls):
        layer = teacher.module.get_submodule(call.name)
        if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == num_classes:
            rows = layer.weight.detach().float().cpu().flatten(1)
            rows = rows - rows.mean(0)
            return rows / rows.std().clamp(min=1e-12)
    raise UserError(
        f"got generator.embedding=classifier for {teacher.name}, which has no layer of {num_classes} outputs",
        "random for such a network",
    )


@torch.no_grad()
def _settle(network: ClassNetwork, batch_size: int, rng: torch.Generator) -> None:
    """Give the network's norms the statistics of what it makes now, and let them change no more."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the mean over all batches
    for _ in range(STATISTICS_BATCHES):
        draw(network, batch_size, rng)
    network.eval()
