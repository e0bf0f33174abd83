"""Guidance: identities of the formula, which rows the backbone sees, and when."""

import pytest
import torch

from smalti.diffusion import Level, build_schedule, drop_labels, drop_mask, guided_denoiser
from smalti.errors import ConfigError

LEVEL = Level(500.0, 0.6, 0.8)
LABELS = torch.tensor([0, 3])


class Backbone:
    """Answers with the label, in every channel of the prediction; the variance channels carry its negative."""

    def __init__(self, learned_variance=False):
        self.learned_variance, self.calls = learned_variance, []

    def __call__(self, latents, timesteps, class_labels):
        self.calls.append((latents, timesteps, class_labels))
        column = torch.full((len(latents),), -1.0) if class_labels is None else class_labels.to(latents)
        value = column.view(-1, 1, 1, 1).expand_as(latents)
        return torch.cat([value, -value], 1) if self.learned_variance else value


def latents():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def guided_eps(scale, backbone=None, level=LEVEL, **options):
    backbone = backbone or Backbone()
    denoise = guided_denoiser(backbone, LABELS, null_class=10, guidance_scale=scale, **options)
    return denoise(latents(), level).eps[:, :, 0, 0], backbone


def test_scale_1_is_the_conditional_prediction_in_one_plain_batch():
    eps, backbone = guided_eps(1.0)
    assert eps[:, 0].tolist() == [0, 3]
    assert [len(call[0]) for call in backbone.calls] == [2]
    assert backbone.calls[0][2].tolist() == [0, 3]


def test_scale_0_is_the_unconditional_prediction():
    eps, _ = guided_eps(0.0)
    assert eps[:, 0].tolist() == [10, 10]


@pytest.mark.parametrize("scale", [0.25, 1.5, 4.0])
def test_other_scales_lie_on_the_line_through_both_in_one_doubled_batch(scale):
    eps, backbone = guided_eps(scale)
    torch.testing.assert_close(eps, (10 + scale * (LABELS - 10.0))[:, None].expand(2, 4))
    (rows, timesteps, labels), *others = backbone.calls
    assert not others
    assert torch.equal(rows[:2], rows[2:])
    assert torch.equal(rows[:2], latents())
    assert timesteps.tolist() == [500.0] * 4
    assert labels.tolist() == [0, 3, 10, 10]


def test_three_channels_leave_the_fourth_and_the_variance_conditional():
    backbone = Backbone(learned_variance=True)
    denoise = guided_denoiser(
        backbone, LABELS, null_class=10, guidance_scale=2.0, guidance_channels=3, learned_variance=True
    )
    got = denoise(latents(), LEVEL)
    assert got.eps[:, :, 0, 0].tolist() == [[-10, -10, -10, 0], [-4, -4, -4, 3]]
    assert got.mix[:, :, 0, 0].tolist() == [[0.5] * 4, [-1.0] * 4]


def test_all_channels_means_all_but_the_variance():
    denoise = guided_denoiser(
        Backbone(learned_variance=True), LABELS, null_class=10, guidance_scale=2.0, learned_variance=True
    )
    got = denoise(latents(), LEVEL)
    assert got.eps[:, :, 0, 0].tolist() == [[-10] * 4, [-4] * 4]
    assert got.mix[:, :, 0, 0].tolist() == [[0.5] * 4, [-1.0] * 4]


def test_guiding_every_prediction_guides_x0_by_the_same_rule():
    for prediction in ("eps", "x0", "v", "velocity"):

        def x0(scale, prediction=prediction):
            denoise = guided_denoiser(Backbone(), LABELS, null_class=10, guidance_scale=scale, prediction=prediction)
            return denoise(latents(), LEVEL).x0

        torch.testing.assert_close(x0(3.0), x0(0.0) + 3 * (x0(1.0) - x0(0.0)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("timestep", "rows"), [(199.0, 2), (200.0, 4), (500.0, 4), (800.0, 4), (801.0, 2)])
def test_outside_its_interval_guidance_costs_nothing(timestep, rows):
    eps, backbone = guided_eps(2.0, level=Level(timestep, 0.6, 0.8), guidance_interval=(0.2, 0.8))
    assert len(backbone.calls[0][0]) == rows
    assert eps[:, 0].tolist() == ([0, 3] if rows == 2 else [-10, -4])


def test_the_default_interval_covers_every_level_of_every_schedule():
    for name in ("linear", "cosine", "flow"):
        for level in build_schedule(name).levels(10)[:-1]:
            _, backbone = guided_eps(2.0, level=level, prediction="velocity")
            assert len(backbone.calls[0][0]) == 4


def test_no_labels_means_the_null_class_or_nothing():
    backbone = Backbone()
    guided_denoiser(backbone, None, null_class=10)(latents(), LEVEL)
    guided_denoiser(backbone, None)(latents(), LEVEL)
    assert backbone.calls[0][2].tolist() == [10, 10]
    assert backbone.calls[1][2] is None


def test_autocast_concerns_the_backbone_only():
    def backbone(x, timesteps, class_labels):
        assert torch.is_autocast_enabled("cpu")
        return x @ torch.eye(3)

    denoise = guided_denoiser(backbone, None, autocast=torch.bfloat16)
    assert denoise(latents(), LEVEL).x0.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 10], {"null_class": 10}, "class label 10 is out of range; this model knows 0 to 9"),
        ([-1, 1], {"null_class": 10}, "class label -1 is out of range"),
        ([-1, 1], {}, "this model knows 0 or more"),
        ([0, 1], {"guidance_scale": 2.0}, "needs a null class"),
        (None, {"guidance_scale": 2.0, "null_class": 10}, "needs class labels"),
        ([0, 1], {"guidance_scale": -1.0, "null_class": 10}, "0 or more"),
        ([0, 1], {"guidance_scale": float("nan"), "null_class": 10}, "0 or more"),
        ([0, 1], {"guidance_interval": (0.5, 0.2)}, "low <= high"),
        ([0, 1], {"guidance_interval": (0.0, 1000.0)}, "low <= high within 0"),
        ([0, 1], {"guidance_channels": 0}, "at least 1"),
    ],
)
def test_impossible_guidance_says_what_to_do(labels, options, message):
    with pytest.raises(ConfigError, match=message):
        guided_denoiser(Backbone(), None if labels is None else torch.tensor(labels), **options)


def test_label_dropout_hides_the_share_that_was_asked_for():
    uniforms = torch.tensor([0.0, 0.09, 0.1, 0.5])
    dropped = drop_mask(uniforms, 0.1)
    assert drop_labels(torch.tensor([1, 2, 3, 4]), dropped, null_class=9).tolist() == [9, 9, 3, 4]
    assert not drop_mask(uniforms, 0.0).any()
    assert drop_mask(uniforms, 1.0).all()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        drop_mask(uniforms, 1.5)
