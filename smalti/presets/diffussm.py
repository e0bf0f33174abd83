"""DiffuSSM: the sizes of the paper at 256 pixels, and XL at 512.

Source: Yan et al. 2023, arXiv:2311.18257, sec. 4. It gives widths for S, L and XL, and 29 layers and about 673 M
parameters for XL; the depth of S and L is ours. Totals and multiply-adds are counted on the network as resolved in
`smalti/models/diffussm.py`; "published" multiply-adds are those of the paper's formula, 7.5 L D^2 a layer. The paper's
totals of a whole training divide to 280.3 and 1066.2 per image and so contradict it.
"""

from smalti.models import DiffuSSMConfig
from smalti.presets.preset import Preset, Published

_OURS = "arXiv:2311.18257 sec. 4; depth ours"
_FORMULA = "arXiv:2311.18257, by its formula"

DIFFUSSM: tuple[Preset, ...] = (
    Preset(
        "diffussm-s",
        "DiffuSSM-S",
        DiffuSSMConfig(hidden_size=384, depth=29),
        _OURS,
        Published(total=78_092_936),
    ),
    Preset(
        "diffussm-l",
        "DiffuSSM-L",
        DiffuSSMConfig(hidden_size=768, depth=29),
        _OURS,
        Published(total=302_462_216),
    ),
    Preset(
        "diffussm-xl",
        "DiffuSSM-XL",
        DiffuSSMConfig(hidden_size=1152, depth=29),
        _FORMULA,
        Published(673, 295.6, 673_107_848),
    ),
    Preset(
        "diffussm-xl-512",
        "DiffuSSM-XL 512",
        DiffuSSMConfig(hidden_size=1152, depth=29, sample_size=(64, 64)),
        _FORMULA,
        Published(673, 1182.4, 673_107_848),
    ),
)
