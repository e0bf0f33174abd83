"""DiT: its four conditionings against the paper's equations written out once more, its sizes, and its refusals.

Whole networks with released weights are held against the released code in tests/checkpoints/test_official.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from smalti.errors import ConfigError
from smalti.models import DiT, DiTConfig
from smalti.nn.embeddings import sincos_2d, timestep_sinusoid
from smalti.nn.mixers import AttentionConfig

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

CONDITIONINGS = ["adaln_zero", "adaln", "cross_attention", "in_context"]
SMALL = {"hidden_size": 16, "depth": 2, "mixer": AttentionConfig(num_heads=2), "sample_size": (4, 6), "num_classes": 5}


def build(**changes):
    return DiT(DiTConfig(**SMALL | changes))


def scrambled(network, std=0.3):
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return network.double()


def inputs(size=(4, 6), batch=2):
    return torch.randn(batch, 4, *size, dtype=torch.float64), 1000 * torch.rand(batch), torch.tensor([1, 5])[:batch]


def attend(queries, keys, values, heads):
    """Softmax attention, one head after the other."""
    out = []
    for q, k, v in zip(*(t.chunk(heads, dim=-1) for t in (queries, keys, values)), strict=True):
        out.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v)
    return torch.cat(out, dim=-1)


def by_the_paper(network, latents, timesteps, labels):
    """The network's equations (sec. 3.2 and fig. 3), on its weights, sharing no code with it but the embeddings."""
    s, c = network.state_dict(), network.config
    kind, d, p = c.conditioning, c.hidden_size, c.patch_size
    heads = c.mixer.num_heads

    def dense(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(x, name=None):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x if name is None else x * s[f"{name}.weight"] + s[f"{name}.bias"]

    time = dense("conditioning.timestep.fc1", timestep_sinusoid(timesteps, 256).double())
    time = dense("conditioning.timestep.fc2", time * time.sigmoid())
    label = s["conditioning.label.weight"][labels]
    cond = time + label
    x = F.conv2d(latents, s["embed.proj.weight"], s["embed.proj.bias"], stride=p).flatten(2).mT
    rows, columns = latents.shape[2] // p, latents.shape[3] // p
    position = sincos_2d(rows, columns, d)
    x = x + (position.float().double() if c.grid == (rows, columns) else position)  # the stored table is float32
    if kind == "in_context":
        x = torch.cat([x, time[:, None], label[:, None]], dim=1)
    for i in range(c.depth):
        b = f"blocks.{i}"
        one, shift1, scale1, gate1, shift2, scale2, gate2 = 1, 0, 0, 1, 0, 0, 1
        names = (f"{b}.norm1", f"{b}.norm2") if kind in ("cross_attention", "in_context") else (None, None)
        if kind == "adaln_zero":
            m = dense(f"{b}.modulation.linear", cond * cond.sigmoid())[:, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        if kind == "adaln":
            m = dense(f"{b}.modulation.linear", cond * cond.sigmoid())[:, None]
            shift1, scale1, shift2, scale2 = m.chunk(4, dim=-1)
        h = norm(x, names[0]) * (one + scale1) + shift1
        q, k, v = dense(f"{b}.mixer.qkv", h).chunk(3, dim=-1)
        x = x + gate1 * dense(f"{b}.mixer.out", attend(q, k, v, heads))
        if kind == "cross_attention":
            context = torch.stack([time, label], dim=1)
            q = dense(f"{b}.context.query", norm(x, f"{b}.context.norm"))
            k, v = dense(f"{b}.context.key", context), dense(f"{b}.context.value", context)
            x = x + dense(f"{b}.context.out", attend(q, k, v, c.context_heads or heads))
        h = norm(x, names[1]) * (one + scale2) + shift2
        h = dense(f"{b}.mlp.fc1", h)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * dense(f"{b}.mlp.fc2", h)
    x = x[:, : rows * columns]
    if kind in ("adaln_zero", "adaln"):
        shift, scale = dense("head.modulation.linear", cond * cond.sigmoid())[:, None].chunk(2, dim=-1)
        x = norm(x) * (1 + scale) + shift
    else:
        x = norm(x, "head.norm")
    x = dense("head.out", x).view(len(x), rows, columns, p, p, c.out_channels)
    return torch.einsum("brcpqo->borpcq", x).reshape(len(x), c.out_channels, rows * p, columns * p)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("size", [(4, 6), (8, 2)])
def test_the_network_computes_the_paper_s_equations(conditioning, size):
    network = scrambled(build(conditioning=conditioning))
    arguments = inputs(size)
    torch.testing.assert_close(network(*arguments), by_the_paper(network, *arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_all_conditionings_start_by_saying_zero(conditioning):
    latents, timesteps, labels = inputs()
    assert build(conditioning=conditioning)(latents.float(), timesteps, labels).abs().max() == 0


def test_an_adaln_zero_block_starts_as_the_identity_and_the_others_do_not():
    x, cond, context = torch.randn(2, 6, 16), torch.randn(2, 16), torch.randn(2, 2, 16)
    for conditioning in CONDITIONINGS:
        network = build(conditioning=conditioning)
        same = torch.equal(network.blocks[0](x, cond, context, network.config.grid), x)
        assert same is (conditioning == "adaln_zero"), conditioning


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_reach_every_trainable_weight_within_three_steps(conditioning):
    network = build(conditioning=conditioning)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        output = network(torch.randn(6, 4, 4, 6), torch.rand(6), torch.arange(6))
        (output - torch.randn_like(output)).square().mean().backward()
        optimizer.step()
    silent = {n for n, p in network.named_parameters() if p.grad is None or not (p.grad != 0).any()}
    # A bias on keys shifts all scores of a query alike: the softmax does not feel it, so nothing but rounding is there.
    assert {name for name in silent if not name.endswith("context.key.bias")} == {"position"}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_timestep_and_class_reach_the_output(conditioning):
    network, (latents, timesteps, labels) = scrambled(build(conditioning=conditioning)), inputs()
    output = network(latents, timesteps, labels)
    assert (output - network(latents, timesteps + 5, labels)).abs().max() > 1e-6
    assert (output - network(latents, timesteps, labels - 1)).abs().max() > 1e-6


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_unconditional_networks_of_every_conditioning_work(conditioning):
    network = scrambled(build(conditioning=conditioning, num_classes=0))
    latents, timesteps, _ = inputs()
    assert network(latents, timesteps).shape == (2, 8, 4, 6)
    assert not any("label" in name for name, _ in network.named_parameters())
    assert (network(latents, timesteps) - network(latents, timesteps + 5)).abs().max() > 1e-6


def test_the_context_tokens_are_dropped_before_the_head():
    network, seen = scrambled(build(conditioning="in_context")), []
    network.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    network.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    network(*inputs())
    assert seen == [(2, 6 + 2, 16), (2, 6, 16)]


def test_the_context_tokens_carry_no_position():
    network, seen = scrambled(build(conditioning="in_context")), []
    network.blocks[0].register_forward_pre_hook(lambda module, args: seen.append((args[0][:, :2], args[2])))
    network(*inputs())
    (tokens, context) = seen[0]
    assert torch.equal(tokens, context)


def test_cross_attention_looks_at_the_context_and_not_at_the_sum():
    network = scrambled(build(conditioning="cross_attention"))
    block, grid = network.blocks[0], network.config.grid
    x, cond, context = (torch.randn(2, n, 16, dtype=torch.float64) for n in (6, 1, 2))
    output = block(x, cond[:, 0], context, grid)
    assert torch.equal(output, block(x, cond[:, 0] + 1, context, grid))
    assert (output - block(x, cond[:, 0], context + 1, grid)).abs().max() > 1e-6


def test_cross_attention_heads_follow_the_mixer_unless_set():
    assert build(conditioning="cross_attention").blocks[0].context.num_heads == 2
    assert build(conditioning="cross_attention", context_heads=8).blocks[0].context.num_heads == 8


@pytest.mark.parametrize("null_class", [True, False])
def test_the_null_class_is_one_more_row(null_class):
    network = scrambled(build(null_class=null_class))
    assert network.conditioning.label.weight.shape[0] == 5 + null_class
    latents, timesteps, _ = inputs()
    if null_class:
        assert network(latents, timesteps, torch.tensor([5, 5])).isfinite().all()
    else:
        with pytest.raises(IndexError):
            network(latents, timesteps, torch.tensor([5, 5]))


def test_the_position_table_is_stored_counted_and_not_trained():
    network = build()
    assert not network.position.requires_grad
    torch.testing.assert_close(network.position[0], sincos_2d(2, 3, 16).float())
    assert "position" in network.state_dict()


def test_positions_tell_tokens_apart():
    network = scrambled(build())
    latents = torch.ones(1, 4, 4, 6, dtype=torch.float64)
    output = network(latents, torch.zeros(1), torch.tensor([0]))
    patches = output.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)[0].movedim(0, 2).flatten(0, 1).flatten(1)
    assert patches.unique(dim=0).shape[0] == 6


def test_a_table_that_came_with_weights_is_used_and_fits_its_own_grid_only(no_shape_checks):
    network, arguments = scrambled(build(position="table")), inputs()
    before = network(*arguments)
    with torch.no_grad():
        network.position += 0.1 * torch.randn_like(network.position)
    assert (network(*arguments) - before).abs().max() > 1e-6
    with pytest.raises(ValueError, match=r"grid \(3, 2\): .* fits only \(2, 3\)"):
        network(*inputs((6, 4)))


def test_a_grid_turned_on_its_side_is_not_mistaken_for_the_network_s_own():
    network, (latents, timesteps, labels) = scrambled(build()), inputs((6, 4))
    expected = by_the_paper(network, latents, timesteps, labels)
    torch.testing.assert_close(network(latents, timesteps, labels), expected, rtol=1e-9, atol=1e-9)


def test_networks_work_in_the_default_dtype_of_the_moment():
    torch.set_default_dtype(torch.float64)
    try:
        network = build()
        assert {p.dtype for p in network.parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


# Total parameters with 1000 classes and 32x32x4 latents, recounted for all twelve presets of the paper's table 1.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PARAMETERS = {
    "S": {8: 33_148_160, 4: 32_945_024, 2: 32_963_360},
    "B": {8: 130_881_536, 4: 130_475_648, 2: 130_512_416},
    "L": {8: 458_594_816, 4: 458_053_760, 2: 458_102_816},
    "XL": {8: 675_683_072, 4: 675_074_432, 2: 675_129_632},
}
# Trainable parameters of XL/2; the paper prints 449, 598, 600 and 675 million (fig. 5 and table 4).
TRAINABLE = {
    "in_context": 449_162_528,
    "cross_attention": 597_991_712,
    "adaln": 600_452_384,
    "adaln_zero": 674_834_720,
}


def preset(size, patch_size, **changes):
    depth, hidden_size, heads = SIZES[size]
    config = DiTConfig(
        hidden_size=hidden_size, depth=depth, mixer=AttentionConfig(num_heads=heads), patch_size=patch_size, **changes
    )
    with torch.device("meta"):
        return DiT(config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_the_presets_have_the_paper_s_parameters(size, patch_size):
    assert sum(p.numel() for p in preset(size, patch_size).parameters()) == PARAMETERS[size][patch_size]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_each_conditioning_has_the_paper_s_parameters(conditioning):
    network = preset("XL", 2, conditioning=conditioning)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == TRAINABLE[conditioning]


def test_larger_latents_only_grow_the_position_table():
    network = preset("XL", 2, sample_size=(64, 64))
    assert sum(p.numel() for p in network.parameters()) == 676_014_368


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 18, "mixer": AttentionConfig(num_heads=1)}, "hidden_size 18 must be a multiple of 4"),
        ({"hidden_size": 0}, "hidden_size 0 must be a multiple of 4"),
        ({"hidden_size": 20, "mixer": AttentionConfig(num_heads=3)}, "hidden_size 20 cannot be split into 3 heads"),
        ({"depth": 0}, "depth 0 at least 1"),
        ({"patch_size": 4}, "latents of 4x6 cannot be cut into patches of 4: choose a patch_size that divides both"),
        ({"patch_size": 0}, "patches of 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0 leaves no channels"),
        ({"mlp_ratio": -1.0}, "mlp_ratio -1.0 leaves no channels"),
        ({"conditioning": "adaln-zero"}, "unknown conditioning 'adaln-zero'; did you mean 'adaln_zero'?"),
        ({"position": "sincos"}, "unknown position 'sincos'; did you mean 'sincos_2d'?"),
        ({"context_heads": 2}, "context_heads has no meaning for conditioning 'adaln_zero': leave it out"),
        ({"context_heads": 3, "conditioning": "cross_attention"}, "hidden_size 16 cannot be split into 3 heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError) as caught:
        build(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
