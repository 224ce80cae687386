"""Strong gravitational lenses with three kinds of dark matter in them, simulated with lenstronomy.

After the first data set of DeepLenseSim (Alexander et al., Deep Learning the Morphology of Dark Matter Substructure,
ApJ 2020): a Sersic source behind an isothermal ellipsoid with shear, seen through a Gaussian point spread function,
with noise.
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
FIELD = 6.4  # arcsec
PSF = 0.12  # arcsec, full width at half maximum
SIGNAL_TO_NOISE = 25  # at the brightest pixel
RADIUS = 1.77  # arcsec, Einstein radius of 1e12 solar masses at redshift 0.5 before a source at 1; goes as their root
SUBHALOS, LIGHTEST, HEAVIEST, SLOPE = 25, 3e8, 1e10, -1.9  # mean number; solar masses; of their mass function
VORTEX, VORTEX_LENGTH, VORTEX_POINTS = 3e10, (0.5, 2.0), 50  # solar masses; arcsec; points that make up the line
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
    centre = rng.uniform(-0.1, 0.1, 2)
    masses, points = _substructure(index % len(CLASSES), centre, rng)
    halo = {"theta_E": rng.uniform(1.2, 1.6), **_ellipticity(rng), **_at(centre)}
    shear = dict(zip(("gamma1", "gamma2"), rng.normal(0, 0.03, 2)))
    lenses = [{"theta_E": RADIUS * np.sqrt(m / 1e12), **_at(p)} for m, p in zip(masses, points)]
    source = {"amp": 1.0, "R_sersic": rng.uniform(0.15, 0.4), "n_sersic": rng.uniform(0.8, 2.0), **_ellipticity(rng),
              **_at(rng.uniform(-0.3, 0.3, 2))}
    pixel = FIELD / size
    corner = -pixel * (size - 1) / 2
    data = ImageData(np.zeros((size, size)), ra_at_xy_0=corner, dec_at_xy_0=corner,
                     transform_pix2angle=pixel * np.eye(2))
    model = ImageModel(data, PointSpread("GAUSSIAN", fwhm=PSF, pixel_size=pixel),
                       LensModel(["SIE", "SHEAR", *len(lenses) * ["POINT_MASS"]]), LightModel(["SERSIC_ELLIPSE"]),
                       kwargs_numerics={"supersampling_factor": 2})
    image = model.image([halo, shear, *lenses], [source])
    return (image / image.max() + rng.normal(0, 1 / SIGNAL_TO_NOISE, image.shape)).astype(np.float32)


def _substructure(kind, centre, rng):
    """(solar masses [n], positions [n, 2] in arcsec) of point masses."""
    if CLASSES[kind] == "no substructure":
        return [], []
    if CLASSES[kind] == "subhalos":
        count = rng.poisson(SUBHALOS)
        ends = np.array([LIGHTEST, HEAVIEST]) ** (SLOPE + 1)
        masses = (ends[0] + rng.random(count) * (ends[1] - ends[0])) ** (1 / (SLOPE + 1))
        return masses, centre + rng.uniform(-2, 2, (count, 2))
    length, angle, middle = rng.uniform(*VORTEX_LENGTH), rng.uniform(0, np.pi), rng.uniform(-1, 1, 2)
    along = np.linspace(-length / 2, length / 2, VORTEX_POINTS)[:, None]
    masses = np.full(VORTEX_POINTS, VORTEX / VORTEX_POINTS)
    return masses, centre + middle + along * [np.cos(angle), np.sin(angle)]


def _ellipticity(rng):
    return dict(zip(("e1", "e2"), rng.normal(0, 0.1, 2)))


def _at(point):
    return dict(zip(("center_x", "center_y"), point))
