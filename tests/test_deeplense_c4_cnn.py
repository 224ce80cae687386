"""The DeepLense CNN: what of it is invariant, and what is not as published."""
import escnn.nn
import pytest
import torch

from equiconv import models
from equiconv.testing import EquivarianceWarning, check_equivariance

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"widths": 6 * (2,), "hidden": 8}


def test_published_head_reads_all_positions():
    with torch.device("meta"):
        model = models.create("deeplense_c4_cnn")
    assert model.head[0].in_features == 64 * 25 * 25  # 40000
    expanded = [m.in_type.size * m.out_type.size * m.kernel_size ** 2 for m in model.modules()
                if isinstance(m, escnn.nn.R2Conv)]
    assert sum(expanded) / 1e6 == pytest.approx(9.4, abs=0.05)


def test_invariance():
    """With the mean over space, exactly; as published not, for its head, and for the rows that pooling leaves over."""
    torch.manual_seed(0)
    model = models.create("deeplense_c4_cnn", flatten=False, image_size=33, **SMALL)
    published = models.create("deeplense_c4_cnn", image_size=33, **SMALL)
    for m in (model, published):
        for _ in range(3):
            m(torch.randn(4, 1, 33, 33))
    quarters = [g for g in model.in_type.fibergroup.elements if g != model.in_type.fibergroup.identity]
    result = check_equivariance(model, elements=quarters)
    assert len(result.exact) == 3 and result.max < 1e-5 and not result.warnings
    assert check_equivariance(published, elements=quarters).max > 1e-2
    assert check_equivariance(published.features, input_size=33, elements=quarters).max < 1e-5
    even = models.create("deeplense_c4_cnn", image_size=32, **SMALL)
    with pytest.warns(EquivarianceWarning, match="leaves a row over"):
        assert check_equivariance(even.features, input_size=32, elements=quarters).max > 1e-3


def test_size_that_breaks_the_invariance():
    with pytest.raises(ValueError, match="image size 128 .*129.* would do"):
        models.create("deeplense_c4_cnn", flatten=False, **SMALL)
