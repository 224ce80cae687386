"""steerable_conv by its definition: the stages of layout.factorised, in plain PyTorch."""
import torch
import torch.nn.functional as F

#: {name: (y = f(x, alpha), its derivative in terms of y and alpha)}, in the order of Activation in
#: csrc/steerable_conv.h. Each f is monotonous, so that y says what the derivative is
ACTIVATIONS = {
    "identity": (lambda x, alpha: x, lambda y, alpha: torch.ones_like(y)),
    "relu": (lambda x, alpha: F.relu(x), lambda y, alpha: (y > 0).to(y.dtype)),
    "leaky_relu": (F.leaky_relu, lambda y, alpha: torch.where(y > 0, torch.ones_like(y), alpha)),
    "elu": (F.elu, lambda y, alpha: torch.where(y > 0, 1, y + alpha)),
    "sigmoid": (lambda x, alpha: torch.sigmoid(x), lambda y, alpha: y * (1 - y)),
    "tanh": (lambda x, alpha: torch.tanh(x), lambda y, alpha: 1 - y.square()),
}


def steerable_conv(x, weights, bias, plan, geometry):
    """The target of a FactorisedPlan for the source x, along a Geometry; bias [target_channels] or None."""
    sources = x.chunk(geometry.groups, 1)
    y = torch.cat([_group(source, weights, plan, geometry, g) for g, source in enumerate(sources)], 1)
    return y if bias is None else y + bias.view(-1, *[1] * len(geometry.kernel))


def _group(x, weights, plan, geometry, g):
    """x [B, channels of this group of the convolution, *size]"""
    z = [_combined(x, source, plan, geometry) for source in plan.sources]
    zero = x.new_zeros(len(x), 1, *geometry.target_size)
    y_hat = {}  # (target, group, m) -> [B, fields, a, *size]
    for block in plan.blocks:
        w = _weights_of(block, weights, plan, geometry, g)
        z_of_source = z[plan.sources.index(block.source)]
        for group, m, k, path, scale in block.entries:
            term = scale * torch.einsum("ts,bsa...->bta...", w[..., path], z_of_source[group, k])
            key = plan.targets.index(block.target), group, m
            y_hat[key] = y_hat[key] + term if key in y_hat else term
    y = x.new_zeros(len(x), geometry.target_channels // geometry.groups, *geometry.target_size)
    for t, target in enumerate(plan.targets):
        fields = geometry.fields(target.fields, of_source=False)
        zeros = zero.expand(-1, fields, *zero.shape[2:])
        components = [y_hat[t, group, m][:, :, a] if (t, group, m) in y_hat else zeros
                      for _, (group, m, a) in sorted(target.places.items())]
        transform = torch.as_tensor(target.transform, dtype=x.dtype, device=x.device)
        values = torch.einsum("ij,bfj...->bfi...", transform, torch.stack(components, 2))
        y = y.index_add(1, _channels(target.fields, fields, x.device), values.flatten(1, 2))
    return y


def _combined(x, source, plan, geometry):
    """{(group, k): z [B, fields, components, *size]} of the fields of one representation."""
    fields, size = geometry.fields(source.fields, of_source=True), source.fields.layout.size
    transform = torch.as_tensor(source.transform, dtype=x.dtype, device=x.device)
    values = x[:, _channels(source.fields, fields, x.device)].unflatten(1, (fields, size))
    u = _harmonics(torch.einsum("ij,bfj...->bfi...", transform, values), plan.harmonics, geometry)
    z, zero = {}, torch.zeros_like(u[:, :, 0, 0])
    for row in source.rows:  # the components of a k come in order
        z.setdefault((row.group, row.k), []).append(sum((c * u[:, :, b, h] for b, h, c in row.terms), zero))
    return {key: torch.stack(components, 2) for key, components in z.items()}


def _harmonics(x, harmonics, geometry):
    """u [B, fields, size, R, *target_size] of x^ [B, fields, size, *source_size]."""
    d = len(geometry.kernel)
    kernels = torch.as_tensor(harmonics, dtype=x.dtype, device=x.device).view(-1, 1, *geometry.kernel)
    planes = x.flatten(0, 2).unsqueeze(1)
    if geometry.up:
        rest = [target - ((size - 1) * s - 2 * p + dil * (k - 1) + 1) for target, size, s, p, dil, k in zip(
            geometry.target_size, geometry.source_size, geometry.stride, geometry.padding, geometry.dilation,
            geometry.kernel)]
        convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
        u = convolution(planes, kernels.transpose(0, 1), None, geometry.stride, geometry.padding, rest, 1,
                        geometry.dilation)
    else:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
        u = convolution(planes, kernels, None, geometry.stride, geometry.padding, geometry.dilation)
    return u.unflatten(0, x.shape[:3])


def _weights_of(block, weights, plan, geometry, g):
    """w [target fields, source fields, paths] of one group of the convolution."""
    count = block.out_fields * block.in_fields * block.paths
    w = weights[block.weights_start:][:count].view(block.out_fields, block.in_fields, block.paths)
    if plan.adjoint:
        w = w.transpose(0, 1)
    return w.chunk(geometry.groups, 1 if geometry.up else 0)[g]


def _channels(fields, count, device):
    """Channels of the first `count` fields: [count * size]."""
    starts = torch.tensor(fields.channels[:count], device=device)
    return (starts[:, None] + torch.arange(fields.layout.size, device=device)).flatten()
