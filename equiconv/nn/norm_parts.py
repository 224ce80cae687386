"""The tables of ops.field_batch_norm: which channels share a variance, and where their numbers are among all."""
from dataclasses import dataclass

import torch

from ..reference.field_batch_norm import MEANS, PART


@dataclass(frozen=True)
class FieldPart:
    """Channels that share a variance, the same in each field of a group.

    size        of them
    kind        of their mean: one of MEANS
    means       numbers of their running mean
    biases      numbers of their bias
    samples     of how many values of each pixel the variance is
    projection  where the matrix [size, size] of the projection of the mean begins among the matrices; or None
    spread      where the matrix [size, biases] begins that makes the bias of the channels; None: they have one
    """
    size: int
    kind: str
    means: int = 0
    biases: int = 0
    samples: int = 1
    projection: int | None = None
    spread: int | None = None


def parts_table(labels, groups, parts, has_mean, has_bias):
    """int64 [P, len(PART)], a row for each part of each field, in the order of channels.

    labels    of the fields, in their order
    groups    FieldGroups; the numbers of a group are those of its fields in turn
    parts     {label of a group: its FieldParts}
    has_mean  for each group, whether there is a tensor of its running means; has_bias the same of biases
    """
    first, place = {}, dict(variance=0, mean=0, bias=0)
    for g, group in enumerate(groups):
        first[group.label] = dict(group=g, mean_group=sum(has_mean[:g]) if has_mean[g] else -1,
                                  bias_group=sum(has_bias[:g]) if has_bias[g] else -1, **place)
        for name, count in _counts(parts[group.label]).items():
            place[name] += group.fields * count
    rows, channel = [], 0
    for label in labels:
        at = first[label]
        for part in parts[label]:
            rows.append(_row(part, at, channel))
            for name, count in _counts([part]).items():
                at[name] += count
            channel += part.size
    return torch.tensor(rows)


def _counts(parts):
    return dict(variance=len(parts), mean=sum(p.means for p in parts), bias=sum(p.biases for p in parts))


def _row(part, at, channel):
    start = {name: -1 if value is None else value for name, value in
             (("projection", part.projection), ("spread", part.spread))}
    row = dict(at, channel=channel, size=part.size, kind=MEANS.index(part.kind), samples=part.samples,
               biases=part.biases, **start)
    if not part.means:
        row["mean_group"] = -1
    return [row[name] for name in PART]
