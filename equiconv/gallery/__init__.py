"""Pictures of equivariance: a rotating image and volume, steerable kernels, errors against the angle."""
from .errors import draw_errors, error_curve
from .kernels import draw_kernels
from .moving import rotate_image, rotate_volume

__all__ = ["draw_errors", "draw_kernels", "error_curve", "rotate_image", "rotate_volume"]
