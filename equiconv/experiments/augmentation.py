"""Changes of the training samples, drawn from torch's global generator in every step anew."""
import math

import torch
import torch.nn.functional as F

SHIFT = 4  # pixels of padding, of which a crop takes some


def random_rotations(count, dim):
    """[count, dim, dim] rotation matrices, uniform over SO(2) or SO(3)."""
    if dim == 2:
        angle = 2 * math.pi * torch.rand(count)
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)
    q = F.normalize(torch.randn(count, 4), dim=1)  # uniform unit quaternions
    w, xyz = q[:, 0, None, None], q[:, 1:]
    cross = torch.linalg.cross(torch.eye(3).expand(count, 3, 3), xyz[:, None].expand(count, 3, 3), dim=2)
    return (2 * w ** 2 - 1) * torch.eye(3) + 2 * xyz[:, :, None] * xyz[:, None] + 2 * w * cross


def rotate(inputs, targets):
    """Inputs [B, C, *size] by any angle about their centre, interpolated, zero outside; classes [B] stay."""
    dim = inputs.dim() - 2
    turns = random_rotations(len(inputs), dim).to(inputs)
    grid = F.affine_grid(F.pad(turns, (0, 1)), inputs.shape, align_corners=False)
    mode = "bicubic" if dim == 2 else "bilinear"
    return F.grid_sample(inputs, grid, mode=mode, align_corners=False), targets


def crop_and_flip(inputs, targets):
    """Images shifted by up to 4 pixels, half of them mirrored, as is customary for CIFAR; classes [B] stay."""
    count, _, height, width = inputs.shape
    padded = F.pad(inputs, 4 * [SHIFT])
    corners = torch.randint(2 * SHIFT + 1, (count, 2)).tolist()
    crops = [image[:, y:y + height, x:x + width] for image, (y, x) in zip(padded, corners)]
    mirrored = (torch.rand(count) < 0.5).tolist()
    return torch.stack([crop.flip(2) if flip else crop for crop, flip in zip(crops, mirrored)]), targets


AUGMENTATIONS = {"none": lambda inputs, targets: (inputs, targets), "rotation": rotate, "crop-flip": crop_and_flip}
