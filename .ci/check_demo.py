"""Fail unless a demo's validation loss is below a line and its page is whole: `check_demo.py RUN constant|linear`."""

import json
import sys
from pathlib import Path

run, line = Path(sys.argv[1]), sys.argv[2]
result = json.loads((run / "result.json").read_text())
page = (run / "index.html").read_text(encoding="utf-8")
print(f"validation {result['validation']:.4f}, {line} {result[line]:.4f}")
if not result["validation"] < result[line]:
    sys.exit(f"the network is not better than the {line} denoiser on the same triples")
if page.count("data:image/png") < 20 or "http://" in page or "https://" in page or not page.endswith("</html>\n"):
    sys.exit("index.html lacks pictures, or is not self-contained")
