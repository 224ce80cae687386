"""Scores of test outputs."""
import torch


def accuracy(outputs, targets):  # [B, classes], [B]
    """Fraction of the samples, in percent."""
    return 100 * (outputs.argmax(1) == targets).double().mean().item()


def dice(outputs, targets):  # [B, classes, *size], [B, *size]
    """Dice overlap of each class in percent, over all samples together: 2 |A and B| / (|A| + |B|).

    A class that occurs in neither counts as found.
    """
    found, classes = outputs.argmax(1), outputs.shape[1]
    both = torch.bincount(targets[found == targets], minlength=classes).double()
    sizes = torch.bincount(found.flatten(), minlength=classes) + torch.bincount(targets.flatten(), minlength=classes)
    return [100.0 if size == 0 else 200 * b / size for b, size in zip(both.tolist(), sizes.tolist())]


def roc(scores, positive):
    """(false positive rate, true positive rate), [thresholds + 1] each, from (0, 0) to (1, 1).

    scores    [n], higher for samples thought positive; equal ones share a threshold
    positive  [n] bool, with both kinds among them
    """
    order = scores.argsort(descending=True)
    scores, positive = scores[order], positive[order]
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])  # of its threshold
    rates = []
    for hits in (~positive, positive):
        count = hits.double().cumsum(0)[last]
        rates.append(torch.cat([torch.zeros(1, dtype=torch.float64), count / count[-1]]))
    return tuple(rates)


def auc(scores, positive):
    """Area under the ROC curve: the probability that a positive sample scores higher than a negative one."""
    false, true = roc(scores, positive)
    return torch.trapezoid(true, false).item()


def one_against_rest(outputs, targets):  # [n, classes], [n]
    """(scores [n], positive [n]) of each class: its softmax, and whether it is the right one."""
    probabilities = outputs.double().softmax(1)
    return [(probabilities[:, c], targets == c) for c in range(outputs.shape[1])]
