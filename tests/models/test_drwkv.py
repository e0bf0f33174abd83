"""Diffusion-RWKV: its topology against the equations written out once more, and everything the paper tries besides.

Whole networks with released weights are held against the released code in tests/checkpoints/test_official_drwkv.py.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from smalti.config import from_dict
from smalti.errors import ConfigError
from smalti.models import DRWKV, BackboneConfig, DRWKVConfig
from smalti.models.drwkv import stretch
from smalti.nn.embeddings import sincos_2d, timestep_sinusoid
from smalti.nn.layers import Grid
from smalti.nn.mixers import AttentionConfig, BiWKVConfig

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

SMALL = {"hidden_size": 16, "depth": 5, "sample_size": (4, 6), "num_classes": 5, "mlp_ratio": 2.0}
CONDITIONINGS = ["adaln_zero", "adaln", "in_context"]
SKIPS = ["concat", "add", "none"]


def build(**changes):
    return DRWKV(DRWKVConfig(**SMALL | changes))


def scrambled(network, std=0.3):
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return network.double()


def inputs(size=(4, 6), batch=2):
    return torch.randn(batch, 4, *size, dtype=torch.float64), 1000 * torch.rand(batch), torch.tensor([1, 5])[:batch]


def moved(x, grid, by=1):
    """Quad shift by padding and rolling; the tokens in front of the image stay."""
    front = x.shape[1] - grid.tokens
    image = x[:, front:].mT.unflatten(2, grid)  # (B, D, rows, columns)
    padded, quarter = F.pad(image, (by, by, by, by)), x.shape[2] // 4
    rows, columns = slice(by, by + grid.rows), slice(by, by + grid.columns)
    left, right = padded[..., rows, : grid.columns], padded[..., rows, 2 * by :]
    up, down = padded[..., : grid.rows, columns], padded[..., 2 * by :, columns]
    parts = [p[:, i * quarter : (i + 1) * quarter] for i, p in enumerate((left, right, up, down))]
    return torch.cat([x[:, :front], torch.cat(parts, dim=1).flatten(2).mT], dim=1)


def by_the_paper(network, latents, timesteps, labels):
    """The network's equations on its weights, sharing no code with it but embeddings and the mixers themselves."""
    s, c, p = network.state_dict(), network.config, network.config.patch_size
    kind = c.conditioning

    def dense(name, x):
        return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0)

    def norm(x, name, eps=1e-5):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"] if f"{name}.weight" in s else x

    def channel_mix(name, x, grid):
        near = moved(x, grid)
        xk, xr = (
            x * s[f"{name}.neighbours.shares.{n}"] + near * (1 - s[f"{name}.neighbours.shares.{n}"])
            for n in ("key", "gate")
        )
        return torch.sigmoid(dense(f"{name}.gate", xr)) * dense(
            f"{name}.value", dense(f"{name}.key", xk).clamp(min=0) ** 2
        )

    time = dense("conditioning.timestep.fc1", timestep_sinusoid(timesteps, 256).double())
    time = dense("conditioning.timestep.fc2", time * time.sigmoid())
    label = s["conditioning.label.weight"][labels]
    cond = time + label
    told = cond * cond.sigmoid()
    x = F.conv2d(latents, s["embed.proj.weight"], s["embed.proj.bias"], stride=p).flatten(2).mT + s["position"]
    grid = c.grid
    if kind == "in_context":
        x = torch.cat([time[:, None], label[:, None], x], dim=1)
    names = [f"in_blocks.{i}" for i in range(c.depth // 2)] + ["mid_blocks.0"]
    names += [f"out_blocks.{i}" for i in range(c.depth // 2)]
    skips = []
    for i, (b, block) in enumerate(zip(names, network.iter_blocks(), strict=True)):
        if i > c.depth // 2:
            skip = skips[c.depth - 1 - i]
            x = (
                dense(f"{b}.join.linear", torch.cat([x, skip], -1))
                if c.skip == "concat"
                else x + skip
                if c.skip == "add"
                else x
            )
        if i == 0:
            x = norm(x, f"{b}.first_norm")
        shift1, scale1, gate1, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1
        if kind == "adaln_zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = dense(f"{b}.modulation.linear", told)[:, None].chunk(
                6, dim=-1
            )
        if kind == "adaln":
            shift1, scale1, shift2, scale2 = dense(f"{b}.modulation.linear", told)[:, None].chunk(4, dim=-1)
        if c.post_norm:
            x = x + gate1 * (norm(block.mixer(x, grid), f"{b}.norm1") * (1 + scale1) + shift1)
            x = x + gate2 * (norm(channel_mix(f"{b}.mlp", x, grid), f"{b}.norm2") * (1 + scale2) + shift2)
        else:
            x = x + gate1 * block.mixer(norm(x, f"{b}.norm1") * (1 + scale1) + shift1, grid)
            x = x + gate2 * channel_mix(f"{b}.mlp", norm(x, f"{b}.norm2") * (1 + scale2) + shift2, grid)
        skips.append(x)
    x = norm(norm(x[:, -grid.tokens :], "norm"), "head.norm", 1e-6)
    if kind != "in_context":
        shift, scale = dense("head.modulation.linear", told)[:, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
    x = dense("head.out", x).view(len(x), *grid, p, p, c.out_channels)
    return torch.einsum("brcpqo->borpcq", x).reshape(len(x), c.out_channels, *latents.shape[2:])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("norm_affine", [True, False])
def test_the_network_computes_the_equations(conditioning, skip, post_norm, norm_affine):
    settings = {"conditioning": conditioning, "skip": skip, "post_norm": post_norm, "norm_affine": norm_affine}
    network = scrambled(build(**settings))
    arguments = inputs()
    torch.testing.assert_close(network(*arguments), by_the_paper(network, *arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("skip", SKIPS)
def test_all_variants_start_by_saying_zero_and_learn_with_every_weight(conditioning, skip):
    network = build(conditioning=conditioning, skip=skip)
    latents, timesteps, labels = inputs()
    assert network(latents.float(), timesteps, labels).abs().max() == 0
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        output = network(torch.randn(6, 4, 4, 6), torch.rand(6), torch.arange(6))
        (output - torch.randn_like(output)).square().mean().backward()
        optimizer.step()
    assert {n for n, p in network.named_parameters() if p.grad is None or not (p.grad != 0).any()} == set()


def test_a_skip_comes_from_the_partner_block_last_in_first_out():
    network, seen = scrambled(build(depth=7, skip="add")), {}
    for i, block in enumerate(network.iter_blocks()):
        block.register_forward_hook(lambda module, args, output, i=i: seen.update({i: (args, output)}))
    network(*inputs())
    for late, early in ((4, 2), (5, 1), (6, 0)):
        assert seen[late][0][3] is seen[early][1]
    assert all(len(seen[i][0]) == 3 for i in range(4))


def test_an_adaln_zero_block_starts_as_the_identity_behind_its_skip():
    x, cond = torch.randn(2, 6, 16), torch.randn(2, 16)
    network = build()
    assert torch.equal(network.in_blocks[1](x, cond, Grid(2, 3)), x)
    skip = torch.randn(2, 6, 16)
    joined = network.out_blocks[0].join(x, skip)
    assert torch.equal(network.out_blocks[0](x, cond, Grid(2, 3), skip), joined)
    torch.testing.assert_close(network.in_blocks[0](x, cond, Grid(2, 3)), F.layer_norm(x, (16,)))  # the extra norm


def test_depth_one_is_the_middle_block_alone():
    network = scrambled(build(depth=1))
    assert [len(part) for part in (network.in_blocks, network.mid_blocks, network.out_blocks)] == [0, 1, 0]
    arguments = inputs()
    torch.testing.assert_close(network(*arguments), by_the_paper(network, *arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_without_its_branches_is_the_identity(post_norm):
    network = scrambled(build(post_norm=post_norm))
    block = network.mid_blocks[0]
    x, cond = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    assert not torch.allclose(block(x, cond, Grid(2, 3)), x)
    assert len(block.branches()) == 2
    for branch in block.branches():
        branch.register_forward_hook(lambda module, args, output: 0 * output)
    assert torch.equal(block(x, cond, Grid(2, 3)), x)


def test_other_mixers_fit_and_the_channel_mix_keeps_its_own_shift():
    network = scrambled(build(mixer=AttentionConfig(num_heads=2), mlp_shift=2))
    assert network.mid_blocks[0].mlp.neighbours.shift == 2
    output = network(*inputs())
    assert output.shape == (2, 8, 4, 6)
    still = scrambled(build(mixer=BiWKVConfig(shift=0), mlp_shift=0))
    assert not any("shares" in name for name, _ in still.named_parameters())


def test_the_channel_mix_starts_by_its_formula():
    network = build(mlp_key_norm=True)
    for i, block in enumerate(network.iter_blocks()):
        expected = (torch.arange(16, dtype=torch.float64) / 16) ** (1 - i / 5)
        for name in ("key", "gate"):
            torch.testing.assert_close(block.mlp.neighbours.shares[name][0, 0].double(), expected, rtol=1e-6, atol=0)
        assert block.mlp.norm.normalized_shape == (32,)
        assert block.mixer.decay[-1].item() == pytest.approx(3)
        assert block.mlp.key.bias is block.mlp.value.bias is block.mlp.gate.bias is None


# --- positions


def test_the_table_starts_as_sincos_and_is_trained_unless_it_is_frozen():
    for position, trained in (("trained", True), ("frozen", False)):
        network = build(position=position)
        torch.testing.assert_close(network.position[0].double(), sincos_2d(2, 3, 16), rtol=0, atol=1e-7)
        assert network.position.requires_grad is trained


def test_a_trained_table_is_stretched_over_another_grid_linearly():
    """Where the table is linear in row and column, so is the stretched one, but for the rim."""
    network = build(sample_size=(16, 12), position="trained").double()  # 8 x 6 tokens
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    with torch.no_grad():
        network.position.zero_()
        network.position[0, :, 0], network.position[0, :, 1] = row.flatten(), column.flatten()
    for grid in (Grid(16, 12), Grid(4, 3), Grid(8, 12), Grid(5, 7)):
        table = network._position_of(grid).unflatten(1, grid)[0]
        rows = ((torch.arange(grid.rows, dtype=torch.float64) + 0.5) * 8 / grid.rows - 0.5).clamp(0, 7)
        columns = ((torch.arange(grid.columns, dtype=torch.float64) + 0.5) * 6 / grid.columns - 0.5).clamp(0, 5)
        torch.testing.assert_close(table[..., 0], rows[:, None].expand(grid))
        torch.testing.assert_close(table[..., 1], columns.expand(grid))
        assert table[..., 2:].abs().max() == 0


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 5), (8, 8), (3, 7), (1, 4), (6, 1)])
def test_stretching_is_torch_s_linear_interpolation(old, new):
    line = torch.randn(1, 2, old, dtype=torch.float64)
    expected = F.interpolate(line, size=new, mode="linear", align_corners=False)
    torch.testing.assert_close(line @ stretch(old, new).T, expected)
    assert torch.equal(stretch(old, old), torch.eye(old, dtype=torch.float64))


def test_a_stretched_table_is_trained_through():
    network = scrambled(build())
    network(*inputs((8, 4))).square().sum().backward()
    assert (network.position.grad != 0).any()


def test_a_frozen_table_is_computed_anew_for_another_grid():
    network = build(position="frozen")
    torch.testing.assert_close(network._position_of(Grid(5, 4))[0].double(), sincos_2d(5, 4, 16), rtol=0, atol=1e-7)


# --- settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 4}, "depth 4 odd, because each block before the middle one has its partner behind it"),
        ({"hidden_size": 18}, "hidden_size 18 must be a multiple of 4"),
        ({"patch_size": 5}, "cannot be cut into patches of 5"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01"),
        ({"mlp_shift": -2}, "shift -2 must be at least 0"),
        ({"mlp_shift_fraction": 1.0}, "the fraction 1.0"),
        ({"skip": "ad"}, "did you mean 'add'?"),
        ({"conditioning": "cross_attention"}, "conditioning: got 'cross_attention'"),
        ({"position": "frosen"}, "did you mean 'frozen'?"),
        ({"mlp_init": "locla"}, "did you mean 'local'?"),
    ],
)
def test_wrong_settings_are_config_errors_in_one_line(changes, said):
    with pytest.raises(ConfigError) as caught:
        from_dict(BackboneConfig, {"kind": "drwkv"} | SMALL | {"sample_size": [4, 6]} | changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["conditioning", "skip", "position", "mlp_init"])
def test_a_config_made_in_python_is_checked_too(name):
    with pytest.raises(ConfigError, match="unknown"):
        DRWKVConfig(**SMALL, **{name: "none of these"})


def test_variants_differ():
    """Each setting reaches the forward pass: the same weights under another setting give another answer."""
    arguments, outputs = inputs(), []
    base = scrambled(build(skip="none"))
    for changes in (
        {"skip": "none"},
        {"skip": "add"},
        {"skip": "none", "post_norm": True},
        {"skip": "none", "mlp_shift": 2},
    ):
        network = build(**changes).double()
        network.load_state_dict(base.state_dict())
        outputs.append(network(*arguments))
    for a, b in itertools.combinations(outputs, 2):
        assert not torch.allclose(a, b)
