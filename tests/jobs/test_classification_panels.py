"""The pictures of a multi-task run, and the files from which examples and routers are drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.readable import assert_readable, visible_texts
from helpers.tiny import images, shake, tiny_vit

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.engine.study import Study, StudyConfig
from vismt.engine.training_files import ADAPTER
from vismt.jobs.image_job import ImageJob
from vismt.jobs.multitask.classifier_job import ClassifierJob
from vismt.jobs.multitask.figures import EXAMPLES_FILE, examples, examples_figure, sections, write_examples
from vismt.jobs.multitask.models import PixelNet
from vismt.lowrank.files.save_load import save_adapter
from vismt.lowrank.layers.base import adapter_modules
from vismt.methods import adapt
from vismt.multitask.emtal.ffn import MoEfiedMlp
from vismt.multitask.emtal.method import set_fade
from vismt.multitask.emtal.router_maps import router_maps
from vismt.multitask.nets import Union
from vismt.report import plotting
from vismt.report.panels import read_panel, spread, to_bytes, write_arrays
from vismt.report.routers import ROUTERS, routers_figure
from vismt.storage.files import sealed
from vismt.storage.lines import read_lines, write_lines

ARMS = ["linear-probe", "lora-4", "emtal", "emtal-no-retain", "emtal-1", "a_name_that_does_not_end_soon", "b", "c"]


def texts(figure):
    return [text for text, _ in visible_texts(figure)]


# ---- examples
def panel(path, arms=("head", "lora"), each=3, names=("a name that does not end at all", "$b$", "c")):
    tasks = [task for task in ("one", "two") for _ in range(each)]
    truth = [f"{task}/{names[i % 3]}" for i, task in enumerate(tasks)]
    wrong = [f"two/{names[2]}"] * len(tasks)
    pixels = np.random.default_rng(0).integers(0, 255, (len(tasks), 3, 16, 24), dtype=np.uint8)
    return write_examples(path, pixels, truth, tasks, {arm: wrong if i else truth for i, arm in enumerate(arms)})


def test_examples_are_kept_as_they_are(tmp_path):
    arrays = read_panel(panel(tmp_path / "a.npz"))
    assert arrays["images"].shape == (6, 3, 16, 24) and arrays["arms"].tolist() == ["head", "lora"]
    assert arrays["predictions"].tolist()[0] == arrays["truth"].tolist()


@pytest.mark.parametrize(("arms", "each"), [(1, 1), (8, 12)])
def test_examples_can_be_read(drawn, tmp_path, arms, each):
    examples_figure(panel(tmp_path / "a.npz", ARMS[:arms], each), tmp_path / "a.png")
    assert_readable(drawn[0])
    assert len(drawn[0].axes) == 2 * min(each, 8)  # more are not drawn
    assert len([text for text in texts(drawn[0]) if text[0] in "✓✗"]) == 2 * min(each, 8) * arms


def test_answers_are_marked_and_named_within_their_task(drawn, tmp_path):
    examples_figure(panel(tmp_path / "a.npz"), tmp_path / "a.png")
    from matplotlib.text import Text

    written = {text.get_text(): text.get_color() for text in drawn[0].findobj(Text)}
    assert written["✓ a name that do…"] == plotting.RIGHT and written["✗ two/c"] == plotting.WRONG
    # The last image is "two/c": the same answer, right, without the name of its own task; the others of "two" are wrong.
    assert written["✓ c"] == plotting.RIGHT and written["✗ c"] == plotting.WRONG
    assert {"one", "two", "head", "lora", "c"} <= set(written)


def test_positions_are_spread_evenly():
    assert spread(12, 3).tolist() == [2, 6, 10] and spread(2, 6).tolist() == [0, 1]
    assert len(set(spread(7, 6).tolist())) == 6


class Part:
    """Stands in for Gathered: image i is all i / 255."""

    def __init__(self, labels):
        self.labels, self.ids = torch.tensor(labels), [f"image {i}" for i in range(len(labels))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return (index / 255).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.fixture
def job(tmp_path):
    """Two arms of two seeds, as far as panels need a job; arm a is right, arm b answers y/s."""
    study = Study(StudyConfig(seeds=[5, 6]), tmp_path, {"a": StudyConfig(), "b": StudyConfig()})
    parts = [Part([0, 0, 1, 1, 0, 1]), Part([2, 3])]
    union = Union(("x", "y"), (2, 2))
    data = SimpleNamespace(union=union, label_names=["x/p", "x/q", "y/r", "y/s"], part=lambda n, split: parts[n])
    for arm, answer in (("a", None), ("b", 3)):
        folder = tmp_path / "arms" / arm / "lr-0.1-seed-5" / "records"
        folder.mkdir(parents=True)
        (tmp_path / "arms" / arm / "chosen.json").write_text(sealed({"lr": 0.1, "validation": {}}))
        for task, part in zip("xy", parts):
            truths = zip(part.ids, part.labels.tolist())
            rows = [{"id": i, "label": k, "clean": k if answer is None else answer} for i, k in truths]
            write_lines(folder / f"test-{task}.jsonl", [{"protocol": "0"}, *rows[::-1]])
    return SimpleNamespace(study=study, folder=tmp_path, data=data, split="test")


def written_examples(job, count=6):
    first = [job.study.trainings(arm)[0] for arm in job.study.arms]
    return examples(job.folder, job.data, job.split, first, job.folder / "a.npz", count)


def test_examples_say_what_the_first_seed_of_each_arm_has_on_record(job, tmp_path):
    arrays = read_panel(written_examples(job, 3))
    assert arrays["images"][:, 0, 0, 0].tolist() == [1, 3, 5, 0, 1]
    assert arrays["truth"].tolist() == ["x/p", "x/q", "x/q", "y/r", "y/s"] == arrays["predictions"].tolist()[0]
    assert set(arrays["predictions"].tolist()[1]) == {"y/s"} and arrays["tasks"].tolist() == ["x"] * 3 + ["y"] * 2


@pytest.mark.parametrize("row", [None, {"id": "image 1", "label": 3}, {"id": "image 1", "clean": 4}])
def test_an_image_without_a_record_is_named(job, tmp_path, row):
    path = tmp_path / "arms" / "b" / "lr-0.1-seed-5" / "records" / "test-y.jsonl"
    lines = read_lines(path)
    write_lines(path, [lines[0], lines[2], *([row] if row else [])])
    with pytest.raises(UserError, match=r"test-y.jsonl' lacks image 'image 1'; `vismt evaluate"):
        written_examples(job)


# ---- routers
def routed(depth=4, fade=0.25, **options):
    vit = tiny_vit(depth=depth, img_size=(16, 24), **options)
    adapt(vit, "emtal", None, 2, None, 0, n_experts=4, cluster=False)
    set_fade(shake(vit, 0.3), fade)
    return PixelNet(Backbone(vit)).eval()


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_routers_are_seen_on_the_patches_at_fade_0(options):
    net, pixels = routed(**options), torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    normed = {}
    hook = net.stock.blocks[2].norm2.register_forward_hook(lambda m, given, out: normed.update(x=out))
    before = net(pixels)
    hook.remove()
    arrays = router_maps(net.train(), pixels)
    assert arrays["omega"].shape == (3, 2, 4, 4, 6) and arrays["blocks"].tolist() == [0, 2, 3] and arrays["depth"] == 4
    part = net.stock.blocks[2].mlp
    shares = torch.softmax(normed["x"].detach() @ part.lora_router.weight.detach().T / part.temperature, -1)
    first = net.stock.num_prefix_tokens
    for row, column in ((0, 0), (1, 4), (3, 5)):  # patches lie row by row
        expected = 4 * shares[:, first + 6 * row + column]
        assert torch.allclose(torch.tensor(arrays["omega"][1, :, :, row, column]).float(), expected, atol=2e-3)
    assert np.ptp(arrays["omega"]) > 0.2
    # The net is left as it was.
    routers = [part for part in adapter_modules(net).values() if isinstance(part, MoEfiedMlp)]
    assert net.training and all(part.fade_value == 0.25 and not part._forward_pre_hooks for part in routers)
    assert torch.equal(net.eval()(pixels), before)


def test_one_block_and_no_router():
    assert router_maps(routed(1), torch.zeros(1, 3, 16, 24))["blocks"].tolist() == [0]
    with pytest.raises(UserError, match="no router"):
        router_maps(PixelNet(Backbone(tiny_vit())), images(1))


def test_an_arm_that_routes_is_seen_on_images_of_all_tasks(job, tmp_path):
    shown = ClassifierJob._mapped_images(job)
    assert (255 * shown[:, 0, 0, 0]).round().tolist() == [1, 4, 0, 1]
    plain = tiny_vit()
    adapt(plain, "lora", rank=2)
    nets, loads = {"a": PixelNet(Backbone(plain)), "b": routed()}, []
    for arm, net in nets.items():
        save_adapter(net.stock, job.study.trainings(arm)[0].folder / ADAPTER)
    pixels = torch.rand(2, 3, 16, 24)

    def loaded(training):
        loads.append((training.arm, training.seed))
        return nets[training.arm]

    ImageJob.write_router_maps(job, loaded, lambda: pixels)
    assert loads == [("b", 5)] and [path.name for path in (tmp_path / ROUTERS).iterdir()] == ["b.npz"]
    arrays = read_panel(tmp_path / ROUTERS / "b.npz")
    assert np.array_equal(arrays["images"], (255 * pixels).round().numpy().astype(np.uint8))
    assert np.array_equal(arrays["omega"], router_maps(nets["b"], pixels)["omega"])


def test_a_report_shows_examples_and_routers_where_there_are_files(tmp_path):
    (section,) = sections(tmp_path)
    assert not section.pictures and section.folded
    panel(tmp_path / EXAMPLES_FILE)
    pixels = torch.rand(1, 3, 16, 24)
    maps = {"images": to_bytes(pixels), **router_maps(routed(), pixels)}
    write_arrays(tmp_path / ROUTERS / "emtal.npz", maps)
    ((section),) = sections(tmp_path)
    assert [picture.title for picture in section.pictures] == ["Examples", "Routers of emtal"]
    assert all(picture.path.exists() for picture in section.pictures)


@pytest.mark.parametrize(("blocks", "experts", "grid"), [(1, 2, (4, 6)), (3, 16, (14, 14))])
def test_routers_can_be_read(drawn, tmp_path, blocks, experts, grid):
    omega = np.random.default_rng(0).uniform(0.5, 0.9, (blocks, 2, experts, *grid)).astype(np.float16)
    omega[0, 1, 1, 2, 3] = 1.75
    pixels = np.zeros((2, 3, 32, 32), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, omega=omega, blocks=np.arange(blocks) * 5, depth=np.array(12))
    routers_figure(tmp_path / "a.npz", tmp_path / "a.png")
    assert_readable(drawn[0])
    arrays = set(texts(drawn[0]))
    assert {"Expert", "Block 1 of 12", "strongest expert", "its weight ω", str(experts), "1.00", "1.75"} <= arrays
    axes = drawn[0].axes
    assert len(axes) == 2 * (1 + 2 * blocks) + 1
    best, most = axes[1 + 2 * blocks + 1].images[0], axes[1 + 2 * blocks + 2].images[0]
    assert best.get_array().shape == grid and best.get_array()[2, 3] == 1 and most.get_array()[2, 3] == 1.75
    assert most.get_clim() == (1.0, 1.75)
    expert = drawn[0].legends[0]
    colors = {text.get_text(): patch.get_facecolor() for text, patch in zip(expert.get_texts(), expert.get_patches())}
    assert best.cmap(best.norm(1)) == colors["2"] and len(set(colors.values())) == experts


# ---- files


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "changed", "pickled", "missing"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = panel(tmp_path / "bad.npz")
    payload = path.read_bytes()
    changed = {
        "cut": payload[:200],
        "empty": b"",
        "text": b"text",
        "changed": payload.replace(payload[100:140], bytes(40)),
    }
    if damage == "pickled":
        np.savez(path, images=np.array([{}], dtype=object))
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"bad\.npz' is not a panel .*; delete it and evaluate the run again"):
        examples_figure(path, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
