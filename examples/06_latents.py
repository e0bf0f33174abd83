"""Train an autoencoder for a few steps, encode images once, draw training examples. Usage: 06_latents.py [FOLDER]"""

import sys
from pathlib import Path

from smalti.data import SampleOrder
from smalti.data.open_examples import load_examples
from smalti.latents import codec_of
from smalti.report.images import save_grid
from smalti.training.autoencoder import AutoencoderConfig
from smalti.workflows.autoencoder import train_autoencoder
from smalti.workflows.encode import EncodeSettings, encode

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/latents")
trained = train_autoencoder(AutoencoderConfig(out=out / "vae", widths=(4, 8), steps=20, batch_size=8, device="cpu"))
print(trained.facts.label, "factor", trained.facts.factor, f"{trained.psnr:.1f} dB")

codec, latents = str(out / "vae"), out / "latents"
encode(EncodeSettings(source="emoji32", codec=codec, out=latents, limit=64, flips="stored", device="cpu"))
examples = load_examples(latents)
order = SampleOrder(range(64), seed=0)
first, second = (examples.load(order, range(start, start + 64), flip=True, seed=0) for start in (0, 64))
print(len(examples.catalogue), "examples of", examples.sample_shape)
a, b = (batch.x0[batch.indices.argsort()] for batch in (first, second))
print("the second epoch draws anew: mean difference", float((a - b).abs().mean()))

decoder = codec_of(examples.codec)  # opened where it lay, and compared with what was recorded
save_grid(decoder.decode(examples.x0(range(16))).clamp(-1, 1), out / "decoded.png", columns=4)
print("decoded:", out / "decoded.png")
