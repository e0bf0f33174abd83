"""Fail unless every network of a demo is below a line, real images are clearly better than all of them, and the page is
whole: `check_demo.py RUN constant|linear`.
"""

import json
import sys
from pathlib import Path

run, line = Path(sys.argv[1]), sys.argv[2]
result = json.loads((run / "result.json").read_text())
page = (run / "index.html").read_text(encoding="utf-8")
for kind, row in result["networks"].items():
    print(f"{kind}: validation {row['validation']:.4f}, {line} {result[line]:.4f}")
if not all(row["validation"] < result[line] for row in result["networks"].values()):
    sys.exit(f"a network is not better than the {line} denoiser on the same triples")
quality = result["quality"]
real = quality["held-out set"]
for metric in ("kid", "fd_pca64"):
    ranked = sorted((rows[metric]["value"], name) for name, rows in quality.items() if rows is not real)
    best = quality[ranked[0][1]][metric]
    print(f"{metric}: held-out set {real[metric]['value']:.4g}, " + ", ".join(f"{k} {v:.4g}" for v, k in ranked))
    if len(ranked) != 4 or real[metric]["high"] >= best["low"]:
        sys.exit(f"held-out real images are not clearly better than every network in {metric}")
macs = [row["macs"] for row in result["networks"].values()]
if len(macs) != 4 or max(macs) > 1.05 * min(macs):
    sys.exit(f"expected four networks of equal multiply-adds within 5 %, got {macs}")
if page.count("data:image/png") < 20 or "http://" in page or "https://" in page or not page.endswith("</html>\n"):
    sys.exit("index.html lacks pictures, or is not self-contained")
