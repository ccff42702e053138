"""The report of a training run: one HTML file with its curves and pictures, to be read without a server."""

import html
from pathlib import Path

from PIL import Image

from eval.files import write_whole
from eval.pictures import as_html


WIDTH, HEIGHT, COLORS = 420, 220, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#7f7f7f")
# one chart each: its title, and the names of the log that belong to it (those in _ by how they begin)
CHARTS = {
    "Loss": ("loss", "eval_loss"),
    "Losses, unweighted": ("loss_",),
    "PSNR of held-out images, dB": ("eval_psnr",),
    "SSIM of held-out images": ("eval_ssim",),
    "Codes in use, share": ("codebook_utilization", "eval_codebook_utilization"),
    "Perplexity of the codes": ("codebook_perplexity", "eval_codebook_perplexity"),
    "Learning rates": ("learning_rate_",),
    "Norms of gradients": ("grad_norm", "grad_norm_"),
    "Discriminator: mean logits": ("logits_",),
    "Adaptive weight": ("adaptive_weight",),
    "Images per second": ("images_per_second",),
    "Skipped": ("nonfinite_", "skipped_images"),
}


def write_report(log_history: list[dict], output_dir: str | Path) -> Path:
    """Writes `training_report.html` and returns its path.

    Args:
        log_history: `trainer.state.log_history`.
        output_dir: of the run; its pictures in `reconstructions` are embedded.
    """
    output_dir = Path(output_dir)
    charts = []
    for title, prefixes in CHARTS.items():
        names = sorted({name for entry in log_history for name in entry if _belongs(name, prefixes)})
        curves = {name: [(e["step"], e[name]) for e in log_history if name in e] for name in names}
        if curves:
            charts.append(_chart(title, curves))
    pictures = sorted((output_dir / "reconstructions").glob("*.png"))
    last = {name: value for entry in log_history for name, value in entry.items() if isinstance(value, (int, float))}
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.6g}</td></tr>" for name, value in sorted(last.items()))
    shown = [pictures[i] for i in sorted({0, len(pictures) // 2, len(pictures) - 1})] if pictures else []
    images = "".join(f"<h3>{picture.stem}</h3>{as_html(Image.open(picture))}" for picture in shown)
    page = (
        '<!doctype html><meta charset="utf-8"><title>Training report</title><style>body{font-family:sans-serif;'
        "margin:2em}.charts{display:flex;flex-wrap:wrap;gap:1em}img{max-width:100%}td{padding:0 1em 0 0}</style>"
        f"<h1>Training report</h1><div class=charts>{''.join(charts)}</div><h2>Held-out images</h2><p>Rows in turn: "
        "originals, reconstructions by the weights that are trained, and by their average (if there is one).</p>"
        f"{images}<h2>Last values</h2><table>{rows}</table>"
    )
    path = output_dir / "training_report.html"
    write_whole(path, lambda file: file.write_text(page))
    return path


def _belongs(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or prefix.endswith("_") and name.startswith(prefix) for prefix in prefixes)


def _chart(title: str, curves: dict[str, list[tuple[int, float]]]) -> str:
    """An SVG line chart with a legend; values that are not finite are left out."""
    curves = {name: [(x, y) for x, y in points if abs(y) < float("inf")] for name, points in curves.items()}
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    if not xs:
        return ""
    left, bottom, top = 60, HEIGHT - 20, 10
    span_x, low, high = max(xs) - min(xs) or 1, min(ys), max(ys)
    span_y = high - low or 1

    def at(x: float, y: float) -> str:
        return (
            f"{left + (x - min(xs)) / span_x * (WIDTH - left - 10):.1f},"
            f"{bottom - (y - low) / span_y * (bottom - top):.1f}"
        )

    lines, legend = [], []
    for i, (name, points) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        lines.append(f'<polyline fill="none" stroke="{color}" points="{" ".join(at(*point) for point in points)}"/>')
        lines += [
            f'<circle cx="{at(*p).split(",")[0]}" cy="{at(*p).split(",")[1]}" r="2" fill="{color}"/>' for p in points
        ]
        legend.append(f'<span style="color:{color}">{html.escape(name)}</span>')
    labels = "".join(
        f'<text x="{x}" y="{y}" font-size="11" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in (
            (left - 4, bottom, "end", f"{low:.4g}"),
            (left - 4, top + 8, "end", f"{high:.4g}"),
            (left, HEIGHT - 4, "start", min(xs)),
            (WIDTH - 10, HEIGHT - 4, "end", f"step {max(xs)}"),
        )
    )
    frame = f'<path d="M{left} {top}V{bottom}H{WIDTH - 10}" fill="none" stroke="#999"/>'
    return (
        f"<figure style='margin:0'><figcaption><b>{html.escape(title)}</b><br><small>{' '.join(legend)}</small>"
        f'</figcaption><svg width="{WIDTH}" height="{HEIGHT}">{frame}{"".join(lines)}{labels}</svg></figure>'
    )
