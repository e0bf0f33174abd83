"""DiffuSSM: the block against its equations, its counts, and every choice that the paper leaves open."""

import pytest
import torch
import torch.nn.functional as F

from smalti.config import from_dict, replace, to_dict
from smalti.cost import count_macs, count_parameters
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, DiffuSSM, DiffuSSMConfig, build_backbone
from smalti.models.diffussm import DiffuSSMBlock
from smalti.nn.embeddings import sincos_2d
from smalti.nn.layers import Grid
from smalti.nn.mixers import AttentionConfig, BiSSMConfig, Place
from smalti.presets import PRESETS, create_model

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

SMALL = DiffuSSMConfig(
    hidden_size=16, depth=2, mixer=BiSSMConfig(state_size=8), sample_size=(4, 6), in_channels=3, num_classes=5
)
CHOICES = [
    {},
    {"hourglass": 1},
    {"hourglass": 4},
    {"hourglass": 4, "gather": "md"},
    {"patch_size": 2, "sample_size": (8, 12)},
    {"stream": "short"},
    {"stream": "short", "hourglass": 4, "patch_size": 2, "sample_size": (8, 16)},
    {"pooling": "learned"},
    {"upscale": "learned"},
    {"activation": "silu"},
    {"position": "sincos_2d"},
    {"position": "sincos_2d", "stream": "short"},
    {"conditioning": "adaln"},
    {"conditioning": "in_context"},
    {"conditioning": "in_context", "stream": "short"},
    {"conditioning": "in_context", "hourglass": 4, "num_classes": 0},
    {"conditioning": "cross_attention", "context_heads": 4},
    {"mixer": AttentionConfig(num_heads=4)},
    {"mixer": BiSSMConfig(state_size=8, directions="concat", output="glu")},
]
EACH = pytest.mark.parametrize("changes", CHOICES, ids=str)


class NoNorm(torch.nn.Module):
    def forward(self, x, m):
        return x


def build(**changes):
    return DiffuSSM(replace(SMALL, **changes)).double()


def scrambled(network, std=0.3):
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return network


def inputs(network, batch=2, size=None):
    c = network.config
    latents = torch.randn(batch, c.in_channels, *(size or c.sample_size), dtype=torch.float64)
    labels = torch.arange(batch) % (c.num_classes + 1) if c.num_classes else None
    return latents, 1000 * torch.rand(batch), labels


def block_by_the_paper(block, x, cond, mixer):
    """Section 3 in loops over runs and places, with M tokens to a run, for the defaults and any M."""
    c = SMALL
    shift, scale, gate = (block.modulation.linear.weight @ F.silu(cond) + block.modulation.linear.bias).chunk(3)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    m, d = block.dense.run, c.hidden_size
    runs = len(x) // m
    short = [sum(h[j * m + k] for k in range(m)) / m for j in range(runs)]
    u = torch.empty_like(x)
    for j in range(runs):
        inner = F.gelu(block.dense.fc.weight @ short[j] + block.dense.fc.bias)
        for k in range(m):
            rows = slice(k * d, (k + 1) * d)
            u[j * m + k] = F.gelu(block.dense.up.weight[rows] @ inner + block.dense.up.bias[rows])
    y = mixer(u[None])[0]
    out = torch.empty_like(x)
    for j in range(runs):
        wide = torch.cat([F.gelu(block.fusion.down[k](y[j * m + k])) for k in range(m)])
        assert len(wide) == 2 * d
        product = F.gelu(block.fusion.gathered(wide)) * F.gelu(block.fusion.own(short[j]))
        for k in range(m):
            out[j * m + k] = x[j * m + k] + gate * block.fusion.out(product)
    return out


@pytest.mark.parametrize("hourglass", [1, 2, 4])
def test_a_block_computes_the_paper_s_equations(hourglass):
    block = scrambled(DiffuSSMBlock(replace(SMALL, hourglass=hourglass), Place(0, 1)).double())
    grid = Grid(4, 6)
    x, cond = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    found = block(x, cond, cond[:, None], grid)
    for row in range(2):
        expected = block_by_the_paper(block, x[row], cond[row], lambda u: block.mixer(u, grid))
        torch.testing.assert_close(found[row], expected)


@EACH
def test_every_choice_builds_runs_and_starts_by_saying_zero(changes):
    network = build(**changes)
    latents, timesteps, labels = inputs(network)
    output = network(latents, timesteps, labels)
    assert output.shape == (2, 6, *latents.shape[2:])
    assert not output.any()
    assert from_dict(BackboneConfig, to_dict(network.config)) == network.config


@EACH
def test_every_choice_reaches_all_weights_and_depends_on_all_inputs(changes):
    network = scrambled(build(**changes))
    latents, timesteps, labels = inputs(network)
    latents.requires_grad_()
    output = network(latents, timesteps, labels)
    output.square().sum().backward()
    assert (latents.grad != 0).all()
    assert [name for name, p in network.named_parameters() if p.grad is None or not (p.grad != 0).any()] == []
    assert ((network(latents, timesteps + 50, labels) - output).abs() > 1e-9).any()
    if labels is not None:
        assert ((network(latents, timesteps, labels + 1) - output).abs() > 1e-9).any()


@EACH
def test_every_choice_takes_other_and_non_square_sizes_and_keeps_images_apart(changes):
    network = scrambled(build(**changes))
    p = network.config.patch_size
    latents, timesteps, labels = inputs(network, batch=3, size=(8 * p, 2 * p))
    output = network(latents, timesteps, labels)
    assert output.shape == (3, 6, 8 * p, 2 * p)
    alone = network(latents[1:2], timesteps[1:2], None if labels is None else labels[1:2])
    torch.testing.assert_close(alone, output[1:2])


def test_choices_differ_from_the_default():
    outputs = []
    for changes in CHOICES:
        if changes.get("sample_size") or "num_classes" in changes:
            continue
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = scrambled(build(**changes))
            latents, timesteps, labels = inputs(network)
        outputs.append(network(torch.ones_like(latents), torch.zeros_like(timesteps), labels))
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert not torch.allclose(one, other)


def test_tokens_are_the_pixels_row_by_row_and_the_head_lays_them_back():
    network = build(depth=1)
    with torch.no_grad():  # no block, no norm: what goes in at a pixel comes out there
        network.blocks = torch.nn.ModuleList()
        network.head.norm = NoNorm()
        network.head.modulation.linear.bias.zero_()
        network.head.out.weight.zero_()
        network.head.out.weight[:3, :3] = torch.eye(3)
        network.embed.proj.weight.zero_()
        network.embed.proj.weight[:3, :, 0, 0] = torch.eye(3)
    latents, timesteps, labels = inputs(network)
    torch.testing.assert_close(network(latents, timesteps, labels)[:, :3], latents)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_short_stream_puts_its_runs_back_where_they_came_from(patch_size):
    network = build(depth=1, stream="short", hourglass=3, patch_size=patch_size, sample_size=(4, 6), gather="md")
    pixels = 3 * 3 * patch_size**2
    order = torch.arange(pixels).view(3, 3, patch_size, patch_size)  # run, channel, row, column, as the input is read
    with torch.no_grad():
        network.blocks = torch.nn.ModuleList()
        network.head.norm = NoNorm()
        network.embed.proj.weight.zero_()
        network.head.out.weight.zero_()
        shown = min(pixels, 16)
        network.embed.proj.weight[:shown, :shown] = torch.eye(shown)
        out = network.head.out.weight.view(3, patch_size, patch_size, 6, 16)  # run, row, column, channel
        for run in range(3):
            for channel in range(3):
                for row in range(patch_size):
                    for column in range(patch_size):
                        place = order[run, channel, row, column]
                        if place < shown:
                            out[run, row, column, channel, place] = 1
    latents, timesteps, labels = inputs(network)
    found = network(latents, timesteps, labels)[:, :3]
    same = torch.isclose(found, latents)
    assert (same | (found == 0)).all()
    assert same.float().mean() == pytest.approx(min(1.0, 16 / pixels))


def test_a_block_that_starts_at_zero_is_the_identity():
    block = DiffuSSMBlock(SMALL, Place(0, 1)).double()
    x, cond = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    assert torch.equal(block(x, cond, cond[:, None], Grid(4, 6)), x)
    assert block.branches() == (block.fusion,)


def test_context_tokens_fill_an_hourglass_each_and_are_dropped_before_the_head():
    network = scrambled(build(conditioning="in_context", hourglass=4))
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = network(*inputs(network))
    (x,) = seen
    assert x.shape == (2, 2 * 4 + 24, 16)
    time, label = x[:, :4], x[:, 4:8]
    assert torch.equal(time, time[:, :1].expand(-1, 4, -1))
    assert torch.equal(label, label[:, :1].expand(-1, 4, -1))
    assert output.shape == (2, 6, 4, 6)


def test_the_position_option_adds_dit_s_vectors():
    network, plain = build(position="sincos_2d"), build()
    plain.load_state_dict(network.state_dict())
    scrambled(network)
    plain.load_state_dict(network.state_dict())
    seen = []
    for n in (network, plain):
        n.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            n(*inputs(n))
    torch.testing.assert_close(seen[0] - seen[1], sincos_2d(4, 6, 16).expand(2, -1, -1))


# --- counts


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"hourglass": 1}, 12),
        ({"hourglass": 2}, 13),
        ({"hourglass": 4}, 15),
        ({"hourglass": 8}, 19),
        ({"hourglass": 1, "gather": "md"}, 9),
        ({"hourglass": 2, "gather": "md"}, 13),
        ({"hourglass": 4, "gather": "md"}, 21),
        ({"stream": "short"}, 13),
        ({"pooling": "learned"}, 15),
        ({"upscale": "learned"}, 15),
    ],
)
def test_the_hourglass_has_11_plus_m_squares_of_the_width(changes, times):
    d = 64
    with torch.device("meta"):
        block = DiffuSSMBlock(replace(SMALL, hidden_size=d, sample_size=(8, 8), **changes), Place(0, 1))
    parts = (block.dense, block.fusion, block.shorten)
    assert sum(p.numel() for part in parts for p in part.parameters() if p.ndim > 1) == times * d * d
    assert sum(p.numel() for p in block.modulation.parameters()) == 3 * d * (d + 1)


def test_the_xl_network_has_673_million_parameters_part_by_part():
    d, depth = 1152, 29
    network = create_model("diffussm-xl", device="meta")
    ssm = 2 * 193 * d + d
    hourglass = 13 * d * d + (d + 2 * d + 2 * d + 2 * d + 2 * d + d)  # W0, W_up, W_dn, W1, W2, W3
    block = 3 * d * (d + 1) + hourglass + ssm + d * d + d
    assert block == 23_022_720
    assert {sum(p.numel() for p in b.parameters()) for b in network.iter_blocks()} == {block}
    outer = (4 * d + d) + (256 * d + d + d * d + d) + 1001 * d + 2 * d * (d + 1) + (8 * d + 8)
    counted = count_parameters(network)
    assert counted.total == counted.trained == depth * block + outer == 673_107_848


@pytest.mark.parametrize(
    ("name", "total", "millions"),
    [("s", 78_092_936, 78.1), ("l", 302_462_216, 302.5), ("xl", 673_107_848, 673.1), ("xl-512", 673_107_848, 673.1)],
)
def test_the_presets_have_the_counts_of_their_rows(name, total, millions):
    preset = PRESETS[f"diffussm-{name}"]
    assert preset.published.total == total == count_parameters(preset.config).total
    assert round(total / 1e6, 1) == millions
    assert preset.config.mixer == BiSSMConfig()
    assert ("ours" in preset.source) == (name in ("s", "l"))


@pytest.mark.parametrize(("name", "gmacs", "tokens"), [("xl", 295.7, 1024), ("xl-512", 1182.5, 4096)])
def test_the_xl_network_takes_7_and_a_half_squares_per_token(name, gmacs, tokens):
    preset = PRESETS[f"diffussm-{name}"]
    counted = count_macs(preset.config)
    assert abs(counted.published / 1e9 - gmacs) < 0.05
    formula = 29 * 7.5 * tokens * 1152**2  # the paper's
    assert preset.published.gmacs == pytest.approx(formula / 1e9, abs=0.2)
    assert abs(counted.published - formula) < 0.001 * counted.published
    assert set(counted.by_kind) == {"linear", "fft", "kernel"}
    # The notes' count of the transforms: 4.0 and 18.6 GFLOP, two to a multiply-add.
    assert counted.by_kind["fft"] / 1e9 == pytest.approx({1024: 4.0, 4096: 18.6}[tokens] / 2, rel=0.02)


def test_cost_is_split_into_the_parts_of_the_block():
    network = build()
    assert set(count_parameters(network).by_part) >= {"dense", "mixer", "fusion", "modulation"}
    assert set(count_macs(network).by_part) >= {"dense", "mixer", "fusion", "modulation"}


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": (5, 5)}, "25 tokens are not divisible by hourglass 2"),
        ({"hourglass": 0}, "hourglass 0"),
        ({"hourglass": 3, "hidden_size": 16}, "twice the hidden_size 16 is not divisible by hourglass 3"),
        ({"patch_size": 4}, "cannot be cut into patches of 4"),
        ({"hidden_size": 18}, "hidden_size 18 must be a multiple of 4"),
        ({"depth": 0}, "depth 0 at least 1"),
        ({"stream": "shorter"}, "stream: got 'shorter'"),
        ({"stream": "short", "pooling": "learned"}, "neither pooled nor upscaled"),
        ({"context_heads": 4}, "context_heads 4 with conditioning 'adaln_zero'"),
        ({"conditioning": "cross_attention"}, "context_heads None with conditioning 'cross_attention'"),
        ({"conditioning": "cross_attention", "context_heads": 3}, "cannot be split into 3 heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_backbone(replace(SMALL, **changes))
    assert "\n" not in str(caught.value)


def test_latents_whose_pixels_the_hourglass_does_not_divide_are_refused_in_one_line(no_shape_checks):
    network = build()
    for size in ((5, 5), (3, 7)):
        with pytest.raises(ValueError, match="the number of patches divisible by hourglass 2") as caught:
            network(torch.zeros(1, 3, *size, dtype=torch.float64), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        assert "\n" not in str(caught.value)
    odd = network(torch.zeros(1, 3, 3, 4, dtype=torch.float64), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert odd.shape == (1, 6, 3, 4)
