"""The adapter of FastestDet, an anchor-free detector of one scale: what one has to write for a detector of one's own.

dfq run teacher=factory teacher.factory=fastestdet_network:load teacher.adapter=examples.fastestdet:Adapter \
    teacher.task=detection teacher.input_size=[3,352,352] teacher.mean=[0,0,0] teacher.std=[1,1,1] \
    generator=box_sampling evaluation=coco evaluation.images=DIR evaluation.annotations=FILE.json
"""

import torch
from torchvision.ops import batched_nms

from dfq import Boxes, Candidates, Detector


class Adapter(Detector):
    overlap = 0.45

    def raw(self, images):
        return self.network(images.flip(1))  # it was trained on BGR; [N, 1 + 4 + classes, rows, columns]

    def candidates(self, raw):
        rows, columns = raw.shape[-2:]
        x = (raw[:, 1].tanh() + torch.arange(columns, device=raw.device)) / columns
        y = (raw[:, 2].tanh() + torch.arange(rows, device=raw.device)[:, None]) / rows
        w, h = raw[:, 3].sigmoid() / 2, raw[:, 4].sigmoid() / 2
        boxes = torch.stack([x - w, y - h, x + w, y + h], -1).flatten(1, 2)
        return Candidates(boxes, raw[:, 5:].flatten(2).mT, raw[:, 0].flatten(1), exclusive=True)

    def scores(self, found):  # only because the published network weighs the two probabilities
        classes = found.class_logits.softmax(-1)
        best = classes.amax(-1, keepdim=True)  # one label a place
        return (found.objectness.sigmoid()[..., None] ** 0.6 * best**0.4) * (classes == best)

    def decode(self, raw, image_sizes):  # keeps all of them
        all_, found = self.candidates(raw), []
        for boxes, score, label, (h, w) in zip(all_.boxes, *self.scores(all_).max(-1), image_sizes, strict=True):
            kept = score > self.least_score
            boxes, score, label = boxes[kept] * boxes.new_tensor([w, h] * 2), score[kept], label[kept]
            order = batched_nms(boxes.detach(), score.detach(), label, self.overlap)
            found.append(Boxes(boxes[order], score[order], label[order]))
        return found
