import matplotlib.image
import numpy as np
import pytest

from attnres_ext.models.kimi_linear import presets
from attnres_ext.residual import AttentionResiduals
from attnres_ext.training.loop import Record
from attnres_ext.training.model import site_names, source_names
from attnres_ext.training.plots import DepthMap, average_maps, plot_depth_attention, plot_loss


def records(arms, steps):
    return [
        Record(arm, seed, step, step * 8, None if step == 0 else 3 / (step + 1),
               3.1 / (step + 1) if step % 2 == 0 else None, 1e-3, 1.0, 10.0)
        for step in range(steps + 1)
        for arm in arms
        for seed in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("arms", [["standard"], ["block"], ["standard", "block", "full"]])
@pytest.mark.parametrize("steps", [1, 30])
def test_loss_plot_is_an_image(tmp_path, arms, steps):
    path = tmp_path / "loss.png"
    plot_loss(path, records(arms, steps), "a title")
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert image[..., :3].std() > 0.01
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def depth_map(mode, sublayers_per_block=None):
    config = presets("tiny")
    residual = AttentionResiduals(
        8, config.num_sublayers, mode=mode, sublayers_per_block=sublayers_per_block
    )
    sources = source_names(config, residual)
    weights = [list(np.full(len(names), 1 / len(names))) for names in sources]
    return DepthMap(mode, site_names(config), sources, weights)


def test_sites_and_sources_are_named_by_their_sublayers():
    full = depth_map("full")
    assert full.sites == [
        "1 kda", "1 mlp", "2 kda", "2 moe", "3 kda", "3 moe", "4 mla", "4 moe", "output"
    ]  # fmt: skip
    assert full.sources[3] == ["embedding", "1 kda", "1 mlp", "2 kda"]
    block = depth_map("block", 3)
    assert block.sources[3] == ["embedding", "block 1"]
    assert block.sources[4] == ["embedding", "block 1", "partial"]
    assert block.sources[8] == ["embedding", "block 1", "block 2", "block 3"]


def test_heat_map_is_an_image(tmp_path):
    path = tmp_path / "depth_attention.png"
    plot_depth_attention(path, [depth_map("block", 3), depth_map("full")], "a title")
    image = matplotlib.image.imread(path)
    assert image.shape[1] > image.shape[0] > 300
    # Something is blue: more of it than of red.
    assert (image[..., 2] - image[..., 0]).max() > 0.3


def test_maps_average_over_seeds():
    one, two = depth_map("block", 3), depth_map("block", 3)
    one.weights[1][:] = [1.0, 0.0]
    two.weights[1][:] = [0.5, 0.5]
    assert average_maps([one, two]).weights[1] == [0.75, 0.25]
