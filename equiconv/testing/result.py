"""What check_equivariance() found: numbers, a table, a figure."""
import math
from dataclasses import dataclass, field

EXACT_TOLERANCE = 1e-4  # escnn samples its filters in float32
SMALLEST_DRAWN = 1e-9


@dataclass
class EquivarianceResult:
    """errors     {group element: relative L2 error ||f(g x) - g f(x)|| / ||g f(x)||}
    exact      the elements that map the grid to itself; the errors of all others contain that of interpolation
    tolerance  what was asked for, or None
    warnings   what breaks the equivariance, in which layer, and how to mend it
    names      {group element: what it does}
    angles     {group element: (degrees, whether it preserves orientation)}; nan degrees without a base space

    Prints as a table; figure() and plot(axes) draw it.
    """
    errors: dict
    exact: set
    tolerance: float = None
    warnings: list = field(default_factory=list)
    names: dict = field(default_factory=dict)
    angles: dict = field(default_factory=dict)

    @property
    def mean(self):
        return sum(self.errors.values()) / len(self.errors)

    @property
    def max(self):
        return max(self.errors.values())

    @property
    def max_exact(self):
        """Over the elements that need no interpolation; nan if there are none."""
        return max((e for g, e in self.errors.items() if g in self.exact), default=math.nan)

    @property
    def max_interpolated(self):
        """Over the elements that need interpolation; nan if there are none."""
        return max((e for g, e in self.errors.items() if g not in self.exact), default=math.nan)

    @property
    def passed(self):
        """Whether every error is within the tolerance; without one, whether the exact ones are within 1e-4."""
        if self.tolerance is not None:
            return self.max <= self.tolerance
        return not self.exact or self.max_exact <= EXACT_TOLERANCE

    def __str__(self):
        width = max(len(name) for name in self.names.values())
        lines = [f"{'element'.ljust(width)}  relative error"]
        for g, error in self.errors.items():
            lines.append(f"{self.names[g].ljust(width)}  {error:.2e}" + ("" if g in self.exact else "  interpolated"))
        lines += [f"{'mean'.ljust(width)}  {self.mean:.2e}", f"{'max'.ljust(width)}  {self.max:.2e}"]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings])

    def figure(self):
        """A matplotlib Figure of the errors, ready for savefig()."""
        import matplotlib
        from matplotlib.figure import Figure

        from ..experiments.figures import STYLE
        with matplotlib.rc_context(STYLE):  # no pyplot: the user's backend and figures stay as they are
            figure = Figure(figsize=(5, 2.8))
            self.plot(figure.subplots())
        return figure

    def plot(self, axes):
        """Draws the errors into matplotlib axes: over the angle of rotation, on a logarithmic scale; returns the axes.

        Filled: exact elements. Hollow: interpolated ones. Squares: those that contain a reflection or an inversion.
        """
        from ..experiments.figures import DARK, LIGHT
        elements = list(self.errors)
        on_angles = all(math.isfinite(self.angles[g][0]) for g in elements)
        places = {g: self.angles[g][0] if on_angles else i + 1 for i, g in enumerate(elements)}
        for turns, marker, kind in ((False, "s", "reflection"), (True, "o", "rotation")):
            for exact, face, how in ((True, DARK, "exact"), (False, "white", "interpolated")):
                drawn = sorted((places[g], max(self.errors[g], SMALLEST_DRAWN)) for g in elements
                               if self.angles[g][1] == turns and (g in self.exact) == exact)
                if drawn:
                    axes.plot(*zip(*drawn), marker, color=DARK, mfc=face, ms=4 if turns else 7, label=f"{kind}, {how}",
                              clip_on=False, zorder=3)
        axes.set_yscale("log")
        if self.tolerance is not None:
            axes.axhline(self.tolerance, color=LIGHT, ls="--", lw=1.2, label="tolerance")
        axes.set(xlabel="angle of rotation (degrees)" if on_angles else "group element",
                 ylabel="relative equivariance error")
        if on_angles:
            last = 360 if max(places.values()) > 180 else 180
            axes.set(xlim=(0, last), xticks=range(0, last + 1, last // 8 if last == 360 else 30))
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        low, high = axes.get_ylim()
        if high < 100 * low:  # less than that would show mere rounding as if it were structure
            axes.set_ylim(low / 10, high * 10)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0,
                    fontsize="small", handletextpad=0.4, columnspacing=1.2)
        return axes
