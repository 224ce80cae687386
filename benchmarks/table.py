"""Rows on the screen."""
from rich.table import Table


def table(title, rows):
    """A rich Table of the Rows of one case: methods that do the same work stand together."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for header in ("work", "method", "ms", "p20 - p80", "escnn / it", "floor ms", "of bound", "GFLOP", "MB", "memory",
                   "error", ""):
        result.add_column(header, justify="left" if header in ("work", "method", "") else "right")
    last = None
    for row in sorted(rows, key=lambda r: (r.op, r.mode)):
        if last not in (None, row.mode):
            result.add_section()
        remark = "noisy: " + row.noisy if row.noisy else row.note
        result.add_row(row.mode if row.mode != last else "", row.method, number(row.median_ms),
                       f"{number(row.p20_ms)} - {number(row.p80_ms)}" if row.median_ms != "" else "",
                       _ratio(row), number(row.floor_ms), _of_bound(row), number(row.gflop),
                       number(row.mbytes), number(row.memory_mb), f"{row.error:.1e}" if row.error != "" else "", remark,
                       style="dim" if row.noisy else None)
        last = row.mode
    return result


def _ratio(row):
    return f"{row.speedup:.2f} ({row.speedup_p20:.2f} - {row.speedup_p80:.2f})" if row.speedup != "" else ""


def _of_bound(row):
    return "" if row.of_bound == "" else f"{row.of_bound:.0%}"


def number(value):
    """Three significant digits, without an exponent."""
    if value == "" or value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"
