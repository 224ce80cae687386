"""Public functions of the ops `torch.ops.equiconv.*`: choice of the backend, shapes, errors."""
from .concatenated_act import concatenated_act
from .expand_filter import expand_filter
from .field_batch_norm import field_batch_norm, field_norm_statistics
from .field_dropout import field_dropout
from .field_gate import field_gate
from .field_norm import field_norm, field_norm_moments
from .field_pool import field_pool
from .fourier_act import fourier_act
from .fused_steerable_conv import fused_steerable_conv
from .norm_max_pool import norm_max_pool
from .plain_filter import plain_filter
from .steerable_conv import pack_weights, steerable_conv
from .window_pool import window_pool

__all__ = ["concatenated_act", "expand_filter", "field_batch_norm", "field_dropout", "field_gate", "field_norm",
           "field_norm_moments", "field_norm_statistics", "field_pool", "fourier_act", "fused_steerable_conv",
           "norm_max_pool", "pack_weights", "plain_filter", "steerable_conv", "window_pool"]
