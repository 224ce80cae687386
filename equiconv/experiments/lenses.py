"""Strong gravitational lenses with three kinds of dark matter in them, simulated with lenstronomy.

After the first data set of DeepLenseSim (github.com/mwt5345/DeepLenseSim, deeplense/lens.py; Alexander et al., Deep
Learning the Morphology of Dark Matter Substructure, ApJ 2020): an exponential source somewhere behind an isothermal
ellipsoid of 1e12 solar masses with shear, seen through a Gaussian point spread function, with noise. As there, shapes
and sizes are the same in every image, and the mass of substructure comes on top. Other than there, ellipsoid, shear and
source each point in a direction of their own, as the sky prefers none; pixels are as large as Euclid's; subhalos weigh
at least 3e8 solar masses each, and as much as a vortex together.
"""
import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.progress import track

from .data import MissingData
from .files import write_atomically

CLASSES = ("no substructure", "subhalos", "vortex")
SEED = 20200115
FIELD = 5.3  # arcsec: pixels of 0.1 arcsec in images of 53
PSF = 0.087  # arcsec, full width at half maximum
SIGNAL_TO_NOISE = 50  # at the brightest pixel: 25 in DeepLenseSim's pixels, four of which make one of these
MASS, RADIUS = 1e12, 1.66  # solar masses at redshift 0.5, their Einstein radius in arcsec before a source at 1
ELLIPTICITY, SHEAR = 0.1, 0.05
SOURCE = {"amp": 1.0, "R_sersic": 0.25, "n_sersic": 1.0}  # arcsec; Sersic index
SOURCE_ELLIPTICITY, SOURCE_OFFSET = 0.14, 0.35  # the latter at most and along each axis, arcsec
SUBHALOS, LIGHTEST, HEAVIEST, SLOPE = 25, 3e8, 1e10, -1.9  # mean number; solar masses; of their mass function
SUBHALO_RADII = 0.25, 2.0  # arcsec from the centre
VORTEX, VORTEX_LENGTH, VORTEX_POINTS = 3e10, (1.0, 4.0), 50  # solar masses; arcsec; points that make up the line
CHUNK = 50  # images that a process simulates at a time


def simulated(folder, count, size):
    """(images [count, size, size] float32 with a peak of about 1, classes [count] int64), the same on every call.

    Image i depends on i and the size alone, and shows class i modulo 3. Simulated in parallel once, and kept in the
    folder. Raises MissingData without lenstronomy.
    """
    path = Path(folder) / f"lenses-{count}-{size}-{_fingerprint()}.npy"
    if not path.exists():
        _simulate_all(path, count, size)
    return np.load(path).astype(np.float32), np.arange(count) % len(CLASSES)


def _fingerprint():
    """Of this file: images of other settings are not taken for these."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def _simulate_all(path, count, size):
    require()
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    workers = min(len(os.sched_getaffinity(0)), len(chunks))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        parts = pool.map(_simulate_some, chunks, len(chunks) * [size])
        images = np.concatenate(list(track(parts, "simulating lenses", total=len(chunks))))

    def write(temporary):
        np.save(temporary, images.astype(np.float16))
    write_atomically(path, write)


def require():
    """Raises MissingData without lenstronomy."""
    try:
        import lenstronomy  # noqa: F401
    except ImportError as error:
        raise MissingData("the lenses are simulated with lenstronomy: pip install 'equiconv[lensing]'") from error


def _simulate_some(indices, size):
    return np.stack([simulate(i, size) for i in indices])


def simulate(index, size):
    """Image [size, size] of class index modulo 3."""
    from lenstronomy.Data.imaging_data import ImageData
    from lenstronomy.Data.psf import PSF as PointSpread
    from lenstronomy.ImSim.image_model import ImageModel
    from lenstronomy.LensModel.lens_model import LensModel
    from lenstronomy.LightModel.light_model import LightModel

    rng = np.random.default_rng([SEED, index])
    masses, points = _substructure(index % len(CLASSES), rng)
    halo = {"theta_E": RADIUS, **_directed(ELLIPTICITY, "e1", "e2", rng), **_at((0, 0))}
    shear = _directed(SHEAR, "gamma1", "gamma2", rng)
    lenses = [{"theta_E": RADIUS * np.sqrt(m / MASS), **_at(p)} for m, p in zip(masses, points)]
    source = {**SOURCE, **_directed(SOURCE_ELLIPTICITY, "e1", "e2", rng),
              **_at(rng.uniform(-SOURCE_OFFSET, SOURCE_OFFSET, 2))}
    pixel = FIELD / size
    corner = -pixel * (size - 1) / 2
    data = ImageData(np.zeros((size, size)), ra_at_xy_0=corner, dec_at_xy_0=corner,
                     transform_pix2angle=pixel * np.eye(2))
    model = ImageModel(data, PointSpread("GAUSSIAN", fwhm=PSF, pixel_size=pixel),
                       LensModel(["SIE", "SHEAR", *len(lenses) * ["POINT_MASS"]]), LightModel(["SERSIC_ELLIPSE"]),
                       kwargs_numerics={"supersampling_factor": 2})
    image = model.image([halo, shear, *lenses], [source])
    return (image / image.max() + rng.normal(0, 1 / SIGNAL_TO_NOISE, image.shape)).astype(np.float32)


def _substructure(kind, rng):
    """(solar masses [n], positions [n, 2] in arcsec) of point masses."""
    if CLASSES[kind] == "no substructure":
        return [], []
    if CLASSES[kind] == "subhalos":
        count = rng.poisson(SUBHALOS)
        ends = np.array([LIGHTEST, HEAVIEST]) ** (SLOPE + 1)
        masses = (ends[0] + rng.random(count) * (ends[1] - ends[0])) ** (1 / (SLOPE + 1))
        return masses, rng.uniform(*SUBHALO_RADII, (count, 1)) * _directions(rng.uniform(0, 2 * np.pi, count))
    along = rng.uniform(*VORTEX_LENGTH) * np.linspace(-0.5, 0.5, VORTEX_POINTS)
    masses = np.full(VORTEX_POINTS, VORTEX / VORTEX_POINTS)
    return masses, along[:, None] * _directions(rng.uniform(0, np.pi))


def _directed(size, first, second, rng):
    """Both components of an ellipticity or a shear of that size, in a random direction."""
    return dict(zip((first, second), size * _directions(rng.uniform(0, 2 * np.pi))))


def _directions(angles):  # [...] -> [..., 2]
    return np.stack((np.cos(angles), np.sin(angles)), -1)


def _at(point):
    return dict(zip(("center_x", "center_y"), point))
